-- Give a lease back, to be taken by anybody at once; the delivery does not count.
-- ARGV worker handle attempt id
local rank, entry = string.match(ARGV[2], '^(%a+):(.+)$')
local queue = P .. 'q:' .. rank
local held = redis.call('XPENDING', queue, GROUP, entry, entry, 1, ARGV[1])[1]
if not held then return 0 end
redis.call('XCLAIM', queue, GROUP, ARGV[1], 0, entry, 'IDLE', 86400000, 'RETRYCOUNT', math.max(0, held[4] - 1), 'JUSTID')
redis.call('HSET', P .. 'job:' .. ARGV[4], 'state', 'queued')
return 1
