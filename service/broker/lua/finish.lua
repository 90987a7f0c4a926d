-- Store a result and close its entry. Whoever deletes the entry pays the cost back and counts the outcome, so
-- that accepted = outcomes + entries always holds. The first writer wins; whoever comes later only acknowledges.
-- An `ok` counts whoever brings it; `failed` and `expired` are not heard from a worker that lost its lease while
-- another attempt runs. A job that the server has forgotten still gets its result.
-- KEYS queue job result backlog ledger
-- ARGV group entry outcome result ttl_s attempt
-- Returns 1 when this attempt's result is the one that counts (also when asked again), else 0.
local queue, job, result, backlog, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local group, entry, outcome, data, ttl, attempt = unpack(ARGV)
local found = redis.call('XRANGE', queue, entry, entry)[1]
local current = redis.call('HGET', job, 'attempt')
if found and outcome ~= 'ok' and current and current ~= attempt then
  return 0
end
redis.call('XACK', queue, group, entry)
if found then
  local map = {}
  for i = 1, #found[2], 2 do map[found[2][i]] = found[2][i + 1] end
  redis.call('XDEL', queue, entry)
  redis.call('DECRBY', backlog, map['cost'])
  redis.call('HINCRBY', ledger, outcome, 1)
elseif current then
  return redis.call('HGET', job, 'finished_by') == attempt and 1 or 0
end
if current then
  redis.call('HSET', job, 'state', outcome, 'finished_by', attempt)
  redis.call('HDEL', job, 'payload')
  redis.call('EXPIRE', job, ttl)
end
return redis.call('SET', result, data, 'EX', ttl, 'NX') and 1 or 0
