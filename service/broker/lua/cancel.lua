-- Cancel a job that has not ended: terminal at once, so that a finish that comes later is fenced off.
-- ARGV id ttl_s
-- Returns {1, handle, worker or "", gateways} when this call ended it, else {0}.
local id, ttl = ARGV[1], ARGV[2]
local handle, worker, state = unpack(redis.call('HMGET', P .. 'job:' .. id, 'entry', 'worker', 'state'))
if not handle then return {0} end
local map, rank, entry = entry_at(handle)
if not map then return {0} end
local result = failure(id, 'cancelled', 'cancelled', 'the job was cancelled', false)
local waiting = close(rank, entry, map, 'cancelled', result, ttl)
return {1, handle, state == 'running' and worker or '', waiting}
