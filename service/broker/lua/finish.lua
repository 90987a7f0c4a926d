-- Store a result and close its entry. The first writer wins; whoever comes later only acknowledges.
-- KEYS queue job result backlog ledger
-- ARGV group entry outcome result ttl_s attempt
-- Returns 1 for the first writer, 0 for the rest.
local queue, job, result, backlog, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
redis.call('XACK', queue, ARGV[1], ARGV[2])
redis.call('XDEL', queue, ARGV[2])
local state = redis.call('HMGET', job, 'state', 'cost')
if state[1] ~= 'queued' and state[1] ~= 'running' then
  return 0
end
redis.call('SET', result, ARGV[4], 'EX', ARGV[5])
redis.call('HSET', job, 'state', ARGV[3], 'finished_by', ARGV[6])
redis.call('HDEL', job, 'payload')
redis.call('EXPIRE', job, ARGV[5])
redis.call('DECRBY', backlog, state[2])
redis.call('HINCRBY', ledger, ARGV[3], 1)
return 1
