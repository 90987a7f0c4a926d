-- A job as it stands; and where asked for one that waits, how many entries and how much cost go before it in its rank,
-- counted to 200 entries.
-- ARGV id alive_ms place
-- Returns {} or {{state, owner, submitted_ms, deadline_ms, done, of}, entries ahead or -1, cost ahead, cost per second}.
local AHEAD = 200
local names = {'state', 'owner', 'submitted_ms', 'deadline_ms', 'done', 'of', 'entry'}
local found = redis.call('HMGET', P .. 'job:' .. ARGV[1], unpack(names))
if not found[1] then return {} end
local handle = table.remove(found)
if ARGV[3] ~= '1' or found[1] ~= 'queued' then return {found, -1, 0, '0'} end

local rate, cost = 0, 0
local live = redis.call('ZRANGEBYSCORE', P .. 'workers', now_ms() - ARGV[2], '+inf')
if #live > 0 then
  for _, value in ipairs(redis.call('HMGET', P .. 'rates', unpack(live))) do rate = rate + tonumber(value or 0) end
end
local rank, entry = string.match(handle, '^(%a+):(.+)$')
local cursor = cursor_of(rank) or '0-0'
local before = redis.call('XRANGE', P .. 'q:' .. rank, '(' .. cursor, '(' .. entry, 'COUNT', AHEAD)
for _, one in ipairs(before) do cost = cost + tonumber(mapped(one[2]).cost) end
return {found, #before, cost, tostring(rate)}
