-- Webhooks that are due; each is hidden until its try may be taken for lost.
-- ARGV lease_ms count
-- Returns {id, url, outcome, tries ...}.
local now, due = now_ms(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'hooks', '-inf', now, 'LIMIT', 0, ARGV[2])) do
  redis.call('ZADD', P .. 'hooks', now + ARGV[1], id)
  local tries = redis.call('HINCRBY', P .. 'hook:' .. id, 'tries', 1)
  local known = redis.call('HMGET', P .. 'hook:' .. id, 'url', 'outcome')
  due[#due + 1] = {id, known[1] or '', known[2] or '', tries}
end
return due
