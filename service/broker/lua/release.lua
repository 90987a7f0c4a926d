-- Give a lease back, to be taken by anybody at once; the delivery does not count.
-- ARGV worker handle attempt id
-- Returns 1 (also when asked again), or 0 when the job is another's by now, or over.
local job = P .. 'job:' .. ARGV[4]
local rank, entry = string.match(ARGV[2], '^(%a+):(.+)$')
local queue = P .. 'q:' .. rank
local held = redis.pcall('XPENDING', queue, GROUP, entry, entry, 1, ARGV[1])[1]
local attempt, state = unpack(redis.call('HMGET', job, 'attempt', 'state'))
if not held or attempt ~= ARGV[3] then return 0 end
if state == 'queued' then return 1 end
redis.call('XCLAIM', queue, GROUP, ARGV[1], 0, entry, 'IDLE', RELEASED, 'RETRYCOUNT', math.max(0, held[4] - 1), 'JUSTID')
redis.call('HSET', job, 'state', 'queued')
return 1
