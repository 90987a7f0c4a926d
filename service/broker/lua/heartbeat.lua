-- Renew the leases that this worker still holds; never steal one back.
-- KEYS queue
-- ARGV group worker entry ...
-- Returns the entries that are no longer this worker's: all of them where the group is gone.
local lost = {}
for i = 3, #ARGV do
  local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if held[1] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
