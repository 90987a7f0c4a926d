-- A token bucket. KEYS[1] is the bucket.
-- ARGV tokens_per_s burst
-- Returns 0 when a token was there, else the milliseconds until there is one.
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local known = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local passed = math.max(0, now - tonumber(known[2] or now))  -- another server's clock may be behind after a failover
local tokens = math.min(burst, tonumber(known[1] or burst) + passed * rate / 1000)
local wait = 0
if tokens >= 1 then tokens = tokens - 1 else wait = math.ceil((1 - tokens) / rate * 1000) end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.3f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(burst / rate * 1000) + 1000)
return wait
