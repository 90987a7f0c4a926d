-- Accept a job, or refuse it because the backlog is at its budget. A job that is there already is not queued
-- again: clients retry when a connection breaks before the answer.
-- KEYS queue job backlog ledger
-- ARGV id payload rows cost deadline_budget_ms max_backlog
-- Returns {1, entry, backlog} or {0, "", backlog}.
local queue, job, backlog, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, payload, rows, cost = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if redis.call('EXISTS', job) == 1 then
  return {1, redis.call('HGET', job, 'entry'), tonumber(redis.call('GET', backlog) or '0')}
end
local waiting = tonumber(redis.call('GET', backlog) or '0')
if waiting > 0 and waiting + cost > tonumber(ARGV[6]) then
  return {0, '', waiting}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', job, 'state', 'queued', 'payload', payload,
  'submitted_ms', now, 'deadline_ms', now + ARGV[5])
local entry = redis.call('XADD', queue, '*', 'id', id, 'rows', rows, 'cost', cost)
redis.call('HSET', job, 'entry', entry)
redis.call('HINCRBY', ledger, 'accepted', 1)
return {1, entry, redis.call('INCRBY', backlog, cost)}
