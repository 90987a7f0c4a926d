-- Hand out jobs that fit the free rows: leases that ran out first, then new entries. Stops at the first
-- job that does not fit, without claiming it. A job larger than the pool fits an empty pool only.
-- KEYS queue job_key_prefix backlog ledger
-- ARGV group worker free capacity lease_ms token
-- Returns {full, cursor, {id, entry, deliveries, now, attempt, payload, submitted_ms, deadline_ms} ...}.
local queue, prefix, backlog, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, worker, free, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local lease, token = tonumber(ARGV[5]), ARGV[6]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local taken, full = {}, 0

local function fields(entry)
  local found = redis.call('XRANGE', queue, entry, entry)
  if not found[1] then return nil end
  local map = {}
  for i = 1, #found[1][2], 2 do map[found[1][2][i]] = found[1][2][i + 1] end
  return map
end

local function fits(rows)
  return rows <= free or (rows > capacity and free == capacity)
end

local function hand_out(entry, map, deliveries)
  local job = prefix .. map['id']
  local body = redis.call('HMGET', job, 'payload', 'submitted_ms', 'deadline_ms')
  if not body[1] then
    redis.call('XACK', queue, group, entry)
    redis.call('XDEL', queue, entry)
    redis.call('DECRBY', backlog, map['cost'])
    redis.call('HINCRBY', ledger, 'failed', 1)
    return
  end
  local attempt = token .. ':' .. entry .. ':' .. deliveries
  redis.call('HSET', job, 'state', 'running', 'attempt', attempt, 'worker', worker)
  free = math.max(0, free - tonumber(map['rows']))
  taken[#taken + 1] = {map['id'], entry, deliveries, now, attempt, body[1], body[2], body[3]}
end

while free > 0 do
  local idle = redis.call('XPENDING', queue, group, 'IDLE', lease, '-', '+', 1)
  if not idle[1] then break end
  local entry, deliveries = idle[1][1], idle[1][4] + 1
  local map = fields(entry)
  if not map then
    redis.call('XACK', queue, group, entry)
  elseif fits(tonumber(map['rows'])) then
    redis.call('XAUTOCLAIM', queue, group, worker, lease, entry, 'COUNT', 1)
    hand_out(entry, map, deliveries)
  else
    full = 1
    break
  end
end

local cursor = '0-0'
for _, g in ipairs(redis.call('XINFO', 'GROUPS', queue)) do
  local info = {}
  for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
  if info['name'] == group then cursor = info['last-delivered-id'] end
end

while free > 0 and full == 0 do
  local next = redis.call('XRANGE', queue, '(' .. cursor, '+', 'COUNT', 1)
  if not next[1] then break end
  local map = {}
  for i = 1, #next[1][2], 2 do map[next[1][2][i]] = next[1][2][i + 1] end
  if not fits(tonumber(map['rows'])) then
    full = 1
    break
  end
  cursor = next[1][1]
  redis.call('XREADGROUP', 'GROUP', group, worker, 'COUNT', 1, 'STREAMS', queue, '>')
  hand_out(cursor, map, 1)
end
return {full, cursor, taken}
