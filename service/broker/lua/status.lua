-- A job as it stands, and for one that waits how many entries and how much cost go before it in its rank (counted to
-- 1,000 entries).
-- ARGV id alive_ms
-- Returns {} or {fields, entries ahead or -1, cost ahead, cost per second}.
local job = P .. 'job:' .. ARGV[1]
local fields = redis.call('HGETALL', job)
if #fields == 0 then return {} end
local found = mapped(fields)
local live = redis.call('ZRANGEBYSCORE', P .. 'workers', now_ms() - ARGV[2], '+inf')
local rate, ahead, cost = 0, -1, 0
if #live > 0 then
  for _, value in ipairs(redis.call('HMGET', P .. 'rates', unpack(live))) do rate = rate + tonumber(value or 0) end
end
if found.state == 'queued' then
  local rank, entry = string.match(found.entry, '^(%a+):(.+)$')
  local cursor = cursor_of(rank) or '0-0'
  local before = redis.call('XRANGE', P .. 'q:' .. rank, '(' .. cursor, '(' .. entry, 'COUNT', 1000)
  ahead = #before
  for _, one in ipairs(before) do cost = cost + tonumber(mapped(one[2]).cost) end
end
for i = #fields - 1, 1, -2 do
  if fields[i] == 'payload' then
    table.remove(fields, i + 1)
    table.remove(fields, i)
  end
end
return {fields, ahead, cost, tostring(rate)}
