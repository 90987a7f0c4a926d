-- Accept a job, or say why not. A job that is there already is not queued again but waited for: clients retry when a
-- connection breaks before the answer.
-- ARGV id payload rows cost deadline_budget_ms max_backlog rank owner max_owed reply_to events webhook alive_ms refused
-- limit
-- Returns {verdict, handle, cost waiting ahead, cost per second, milliseconds foreseen}; verdict accepted, attached, full,
-- owed, late, idle. Of work with nothing ahead, or that a worker begins at once, nothing is foreseen; else `limit` is the
-- share of its budget that may be.
local id, payload, rows, cost, budget, most, rank, owner, max_owed, reply, events, webhook, alive, refused, limit =
  unpack(ARGV)
local job = P .. 'job:' .. id
cost, budget, max_owed, limit = tonumber(cost), tonumber(budget), tonumber(max_owed), tonumber(limit)

if tonumber(refused) > 0 then redis.call('HINCRBY', P .. 'turns', 'asked', refused) end
local known = redis.call('HMGET', job, 'entry', 'reply')
if known[1] then
  if reply ~= '' and not string.find(' ' .. known[2] .. ' ', ' ' .. reply .. ' ', 1, true) then
    redis.call('HSET', job, 'reply', known[2] .. ' ' .. reply)
  end
  return {'attached', known[1], 0, '0', 0}
end

local now = now_ms()
local rate, total, ahead, roomy = 0, 0, 0, false
if tonumber(alive) > 0 then
  local live = redis.call('ZRANGEBYSCORE', P .. 'workers', now - alive, '+inf')
  if #live == 0 then return {'idle', '', 0, '0', 0} end
  for _, pressed in ipairs(redis.call('HMGET', P .. 'pressed', unpack(live))) do
    pressed = tonumber(pressed or 0)
    if pressed <= 0 then roomy = true end  -- it begins at once what comes, or knows no rate: no wait to judge
    rate = rate + pressed
  end
end
local function asked() redis.call('HINCRBY', P .. 'turns', 'asked', cost) end
local backlog = {}
for i, queued in ipairs(redis.call('HMGET', P .. 'backlog', unpack(RANKS))) do
  backlog[RANKS[i]] = tonumber(queued or 0)
  total = total + backlog[RANKS[i]]
end
for other, queued in pairs(backlog) do  -- while this rank drains, others get at most their share beside it
  ahead = ahead + math.min(queued, backlog[rank] * WEIGHTS[other] / WEIGHTS[rank])
end
if total > 0 and total + cost > tonumber(most) then
  asked()
  return {'full', '', total, tostring(rate), 0}
end
if max_owed > 0 then
  local owed = tonumber(redis.call('HGET', P .. 'owed', owner) or 0)
  if owed > 0 and owed + cost > max_owed then return {'owed', '', owed, tostring(rate), 0} end
end
local foreseen = 0
if rate > 0 and not roomy and ahead > 0 then foreseen = (ahead + cost) / rate * 1000 end
if foreseen > limit * budget then
  if cost / rate * 1000 <= limit * budget then asked() end  -- what no idle service could do is not asked of this one
  return {'late', '', ahead, tostring(rate), foreseen}
end

local fields = {'id', id, 'rows', rows, 'cost', cost}
for name, value in pairs({owner = owner, events = events, webhook = webhook}) do
  if value ~= '' then
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
end
local handle = rank .. ':' .. redis.call('XADD', P .. 'q:' .. rank, '*', unpack(fields))
redis.call('HSET', job, 'state', 'queued', 'payload', payload, 'entry', handle, 'reply', reply, 'owner', owner,
  'submitted_ms', now, 'deadline_ms', now + budget)
redis.call('ZADD', P .. 'due', now + budget, handle)
redis.call('HINCRBY', P .. 'ledger', 'accepted', 1)
asked()
redis.call('HINCRBY', P .. 'backlog', rank, cost)
if owner ~= '' then redis.call('HINCRBY', P .. 'owed', owner, cost) end
if events ~= '' then tell(id, 'queued', '') end
return {'accepted', handle, total + cost, tostring(rate), foreseen}
