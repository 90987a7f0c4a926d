-- End jobs whose deadline passed by more than a grace: those that wait, and those whose lease ran out. Workers end theirs
-- by themselves; this is for when none lives. One that still runs is looked at again after another grace.
-- ARGV grace_ms lease_ms ttl_s
-- Returns {id, gateways ...}, at most 100.
local lease, ttl = tonumber(ARGV[2]), ARGV[3]
local now, ended = now_ms(), {}
for _, handle in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', now - ARGV[1], 'LIMIT', 0, 100)) do
  local map, rank, entry = entry_at(handle)
  local held = map and redis.pcall('XPENDING', P .. 'q:' .. rank, GROUP, entry, entry, 1)[1]
  if not map then
    redis.call('ZREM', P .. 'due', handle)
  elseif held and held[3] < lease then
    redis.call('ZADD', P .. 'due', now, handle)
  else
    local message = 'the deadline passed before a worker had answered'
    local result = failure(map.id, 'expired', 'deadline_exceeded', message, true)
    ended[#ended + 1] = {map.id, close(rank, entry, map, 'expired', result, ttl)}
  end
end
return ended
