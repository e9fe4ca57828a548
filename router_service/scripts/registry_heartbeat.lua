-- ARGV  2 instance  3 load  4 '1' = the instance is about to stop  5 lease in ms
-- Answer  {'done', state} | {'expired'}
local instance = ARGV[2]
if not redis.call('ZSCORE', leases, instance) then return {'expired'} end
local fact = read(facts, instance)
if ARGV[4] == '1' and not fact.leaving then
  fact.leaving = true
  if fact.state == 'ready' then
    fact.state, fact.policy = 'draining', MIGRATE
    raise_revision()
  end
  write(facts, instance, fact)
end
redis.call('HSET', loads, instance, ARGV[3])
renew(instance, ARGV[5])
return {'done', fact.state}
