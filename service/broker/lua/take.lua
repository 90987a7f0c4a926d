-- Hand out jobs that fit the free rows: leases that ran out first, then new entries, by weighted shares of the ranks
-- (start-time fair queueing by cost, Goyal et al., SIGCOMM 1996). Stops at the first job that does not fit, without
-- claiming it. A job larger than the pool, or one that may have killed its workers, needs an empty pool for itself.
-- Jobs whose deadline passed, or that were delivered too often, end here.
-- A lapsed job that runs alone lets others pass until it was idle for PATIENCE leases: the fleet does not drain for it.
-- ARGV worker free capacity lease_ms token max_deliveries ttl_s reclaim alive_ms
-- `reclaim` is 0 to leave leases that ran out alone: to find them, the server reads all that are held.
-- Returns {full, cursors, {job ...}, {id, outcome, gateways ...}, {backlog, cost ever asked for, live workers}}; full is 2
-- when it is a lapsed job that does not fit.
local worker, token = ARGV[1], ARGV[5]
local free, capacity, lease = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local most, ttl, reclaim = tonumber(ARGV[6]), ARGV[7], ARGV[8] == '1'
local SOLO = 2  -- deliveries beyond which a job runs alone
local PATIENCE = 3
local PASSED = 10  -- lapsed jobs that are passed by in one call
local ENDED = 100  -- jobs that end in one call: the server must not be kept from others
local now = now_ms()
local taken, ended, full = {}, {}, 0

-- Whether there is no room for a job that may still run.
local function waits(map, deliveries)
  local rows = tonumber(map.rows)
  local alone = deliveries > SOLO or rows > capacity
  if deliveries > most or (alone and free == capacity) or (not alone and rows <= free) then return false end
  local deadline = redis.call('HGET', P .. 'job:' .. map.id, 'deadline_ms')
  return deadline and tonumber(deadline) > now
end

local function over(rank, entry, map, outcome, result)
  ended[#ended + 1] = {map.id, outcome, close(rank, entry, map, outcome, result, ttl)}
end

local function bury(rank, entry, map, body, deliveries)
  local why = body.error or 'the worker went away'
  redis.call('XADD', P .. 'dlq', '*', 'id', map.id, 'payload', body.payload, 'rank', rank, 'rows', map.rows,
    'cost', map.cost, 'owner', map.owner or '', 'attempts', deliveries - 1, 'worker', body.worker or '',
    'error', why, 'submitted_ms', body.submitted_ms, 'dead_ms', now)
  over(rank, entry, map, 'dead', failure(map.id, 'dead', 'job_failed',
    'given up after ' .. (deliveries - 1) .. ' deliveries: the worker went away', false))
end

-- `silent` is the worker whose lease ran out. False when the job ended instead.
local function hand_out(rank, entry, map, deliveries, silent)
  local job = P .. 'job:' .. map.id
  local names = {'payload', 'submitted_ms', 'deadline_ms', 'error', 'worker', 'done', 'state'}
  local body = {}
  for i, value in ipairs(redis.call('HMGET', job, unpack(names))) do body[names[i]] = value or nil end
  if silent and body.state == 'running' then
    body.error = 'worker ' .. string.sub(silent, 1, 100) .. ' went silent in delivery ' .. (deliveries - 1)
    redis.call('HSET', job, 'error', body.error)
  end
  if not body.payload then
    over(rank, entry, map, 'failed', failure(map.id, 'failed', 'job_failed', 'the job was lost by the store', true))
    return false
  elseif tonumber(body.deadline_ms) <= now then
    local message = 'the deadline passed while it waited'
    over(rank, entry, map, 'expired', failure(map.id, 'expired', 'deadline_exceeded', message, true))
    return false
  elseif deliveries > most then
    bury(rank, entry, map, body, deliveries)
    return false
  end
  local attempt = table.concat({token, entry, deliveries, now}, ':')
  redis.call('HSET', job, 'state', 'running', 'attempt', attempt, 'worker', worker)
  if map.events then tell(map.id, 'started', '') end
  local solo, rows = deliveries > SOLO, tonumber(map.rows)
  free = solo and 0 or math.max(0, free - rows)
  local states = body.done and redis.call('HGETALL', P .. 'ck:' .. map.id) or {}
  taken[#taken + 1] = {map.id, rank .. ':' .. entry, deliveries, now, attempt, body.payload, body.submitted_ms,
    body.deadline_ms, solo and 1 or 0, map.events and 1 or 0, states}
  return true
end

local lengths, cursors = {}, {}
for _, rank in ipairs(RANKS) do
  local queue = P .. 'q:' .. rank
  lengths[rank], cursors[rank] = redis.call('XLEN', queue), '0-0'
  if lengths[rank] > 0 then cursors[rank] = cursor_of(rank) end
  if not cursors[rank] then return redis.error_reply('NOGROUP ' .. queue) end
end

for _, rank in ipairs(RANKS) do
  local queue, from, passed = P .. 'q:' .. rank, '-', 0
  while reclaim and passed < PASSED and lengths[rank] > 0 and free > 0 and full == 0 and #ended < ENDED do
    local idle = redis.call('XPENDING', queue, GROUP, 'IDLE', lease, from, '+', 1)[1]
    if not idle then break end
    local entry, deliveries = idle[1], idle[4] + 1
    local map = entry_at(rank .. ':' .. entry)
    if not map then
      redis.call('XACK', queue, GROUP, entry)
    elseif waits(map, deliveries) then
      if deliveries > SOLO and idle[3] % RELEASED < PATIENCE * lease then passed = passed + 1 else full = 2 end
    else
      redis.call('XAUTOCLAIM', queue, GROUP, worker, lease, entry, 'COUNT', 1)
      hand_out(rank, entry, map, deliveries, idle[2])
    end
    from = '(' .. entry
  end
end

local tags = {}
local turns = redis.call('HMGET', P .. 'turns', 'now', 'high', 'normal', 'low', 'asked')
local clock, moved = tonumber(turns[1] or 0), false
for i, rank in ipairs(RANKS) do tags[rank] = tonumber(turns[i + 1] or 0) end
local heads = {}
while free > 0 and full == 0 and #ended < ENDED do
  local pick
  for _, rank in ipairs(RANKS) do
    if lengths[rank] > 0 and heads[rank] == nil then
      heads[rank] = redis.call('XRANGE', P .. 'q:' .. rank, '(' .. cursors[rank], '+', 'COUNT', 1)[1] or false
    end
    if heads[rank] and (not pick or math.max(tags[rank], clock) < math.max(tags[pick], clock)) then pick = rank end
  end
  if not pick then break end
  local entry, map = heads[pick][1], mapped(heads[pick][2])
  if waits(map, 1) then
    full = 1
    break
  end
  redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', 1, 'STREAMS', P .. 'q:' .. pick, '>')
  cursors[pick], heads[pick] = entry, nil
  if hand_out(pick, entry, map, 1) then
    clock = math.max(tags[pick], clock)
    tags[pick], moved = clock + map.cost / WEIGHTS[pick], true
  end
end
if moved then
  redis.call('HSET', P .. 'turns', 'now', clock, 'high', tags.high, 'normal', tags.normal, 'low', tags.low)
end
local backlog = 0
for _, cost in ipairs(redis.call('HVALS', P .. 'backlog')) do backlog = backlog + cost end
local live = redis.call('ZCOUNT', P .. 'workers', now - ARGV[9], '+inf')
return {full, {cursors.high, cursors.normal, cursors.low}, taken, ended, {backlog, tonumber(turns[5] or 0), live}}
