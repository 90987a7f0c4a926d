-- Keep the states of running rows, for the current attempt only; and tell followers how far it is. Only the newest preview
-- is kept: its event says that there is a new one.
-- ARGV id attempt ttl_s done of progress preview index state ...
-- Returns 1, or 0 when the job is another's by now, or over.
local id, attempt, ttl, done, of, progress, preview = unpack(ARGV, 1, 7)
local job = P .. 'job:' .. id
local found = redis.call('HMGET', job, 'attempt', 'state')
if found[1] ~= attempt or found[2] ~= 'running' then return 0 end
redis.call('HSET', job, 'done', done, 'of', of)
for i = 8, #ARGV, 2 do redis.call('HSET', P .. 'ck:' .. id, ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', P .. 'ck:' .. id, ttl)
if progress ~= '' then tell(id, 'progress', progress) end
if preview ~= '' and redis.call('EXISTS', P .. 'ev:' .. id) == 1 then
  redis.call('SET', P .. 'pv:' .. id, preview, 'EX', ttl)
  tell(id, 'preview', '')
end
return 1
