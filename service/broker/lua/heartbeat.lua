-- Renew the leases that this worker still holds; never steal one back.
-- ARGV worker handle ...
-- Returns the handles that are no longer this worker's: all of them where the group is gone.
local lost = {}
for i = 2, #ARGV do
  local rank, entry = string.match(ARGV[i], '^(%a+):(.+)$')
  local queue = P .. 'q:' .. rank
  local held = redis.pcall('XPENDING', queue, GROUP, entry, entry, 1, ARGV[1])
  if held[1] then
    redis.call('XCLAIM', queue, GROUP, ARGV[1], 0, entry, 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
