-- What the scripts of one model share. KEYS[1] is the prefix of all its keys, so that a script touches one slot.
-- Streams q:high, q:normal, q:low hold the entries; a handle is <rank>:<entry id>.
local P = KEYS[1]
local GROUP = 'workers'
local RANKS = {'high', 'normal', 'low'}
local RELEASED = 86400000  -- idle time, ms, that a lease starts from when it is handed back
local WEIGHTS = {high = 8, normal = 4, low = 1}

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function mapped(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local function entry_at(handle)
  local rank, entry = string.match(handle, '^(%a+):(.+)$')
  local found = redis.call('XRANGE', P .. 'q:' .. rank, entry, entry)[1]
  return found and mapped(found[2]), rank, entry
end

local function failure(id, outcome, code, message, retryable)
  local said = {code = code, message = message, retryable = retryable}
  return cmsgpack.pack({id = id, outcome = outcome, failure = said})
end

-- Where the group stands in a rank's stream; nil when there is no such group or stream.
local function cursor_of(rank)
  for _, group in ipairs(redis.pcall('XINFO', 'GROUPS', P .. 'q:' .. rank)) do
    group = mapped(group)
    if group['name'] == GROUP then return group['last-delivered-id'] end
  end
end

-- Only `queued` starts a stream: without one nobody follows the job.
local function tell(id, name, data)
  if name ~= 'queued' and redis.call('EXISTS', P .. 'ev:' .. id) == 0 then return end
  redis.call('XADD', P .. 'ev:' .. id, 'MAXLEN', '~', 1000, '*', 'name', name, 'data', data)
end

-- The end of a job: whoever deletes its entry keeps its result, pays its cost back and counts its outcome, so that
-- accepted = outcomes + entries always holds. Returns the gateways to wake, in one string.
local function close(rank, entry, map, outcome, result, ttl)
  local queue, job, back = P .. 'q:' .. rank, P .. 'job:' .. map.id, 0 - map.cost  -- servers refuse -0
  redis.call('XACK', queue, GROUP, entry)
  redis.call('XDEL', queue, entry)
  redis.call('ZREM', P .. 'due', rank .. ':' .. entry)
  redis.call('HINCRBY', P .. 'backlog', rank, back)
  redis.call('HINCRBY', P .. 'ledger', outcome, 1)
  if map.owner and redis.call('HINCRBY', P .. 'owed', map.owner, back) <= 0 then
    redis.call('HDEL', P .. 'owed', map.owner)
  end
  local waiting = redis.call('HGET', job, 'reply')
  if waiting then
    redis.call('HSET', job, 'state', outcome)
    redis.call('HDEL', job, 'payload')
    redis.call('EXPIRE', job, ttl)
  end
  redis.call('SET', P .. 'res:' .. map.id, result, 'EX', ttl, 'NX')
  redis.call('DEL', P .. 'ck:' .. map.id, P .. 'pv:' .. map.id)
  if map.events then
    tell(map.id, 'completed', outcome)
    redis.call('EXPIRE', P .. 'ev:' .. map.id, ttl)
  end
  if map.webhook then
    redis.call('HSET', P .. 'hook:' .. map.id, 'url', map.webhook, 'outcome', outcome, 'tries', 0)
    redis.call('ZADD', P .. 'hooks', 0, map.id)
  end
  return waiting or ''
end
