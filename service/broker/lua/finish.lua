-- Store a result and close its entry. The first writer wins; whoever comes later only acknowledges.
-- An `ok` counts whoever brings it; another outcome is not heard from a worker that lost its lease while another
-- attempt runs. A job that the server has forgotten still gets its result.
-- ARGV id handle outcome result ttl_s attempt
-- Returns {1, gateways} when this attempt's result is the one that counts (also when asked again), else {0, ""}.
local id, handle, outcome, result, ttl, attempt = unpack(ARGV)
local job = P .. 'job:' .. id
local map, rank, entry = entry_at(handle)
local current = redis.call('HGET', job, 'attempt')
if map then
  if outcome ~= 'ok' and current and current ~= attempt then return {0, ''} end
  local waiting = close(rank, entry, map, outcome, result, ttl)
  if current then redis.call('HSET', job, 'finished_by', attempt) end  -- last: a full server denies it as the first
  return {1, waiting}
end
redis.pcall('XACK', P .. 'q:' .. rank, GROUP, entry)
local state, finished_by, reply = unpack(redis.call('HMGET', job, 'state', 'finished_by', 'reply'))
if state == 'queued' or state == 'running' then  -- somebody deleted the entry
  redis.call('HSET', job, 'state', outcome, 'finished_by', attempt)
  redis.call('HDEL', job, 'payload')
  redis.call('EXPIRE', job, ttl)
elseif state then
  return finished_by == attempt and {1, reply or ''} or {0, ''}
end
return {redis.call('SET', P .. 'res:' .. id, result, 'EX', ttl, 'NX') and 1 or 0, reply or ''}
