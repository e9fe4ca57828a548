-- ARGV  2 instance  3 load  4 '1' = the instance is about to stop  5 lease in ms
-- Answer  {'done', state} | {'expired'}
local instance = ARGV[2]
if not redis.call('ZSCORE', leases, instance) then return {'expired'} end
if ARGV[4] == '1' and redis.call('HGET', states, instance) ~= 'draining' then
  redis.call('HSET', states, instance, 'draining')
  raise_revision()
end
redis.call('HSET', loads, instance, ARGV[3])
renew(instance, ARGV[5])
return {'done', redis.call('HGET', states, instance)}
