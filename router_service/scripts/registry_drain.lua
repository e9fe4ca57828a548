-- ARGV  2 instance  3 the revision that the caller has seen
-- Answer  {'done', revision} | {'expired'} | {'conflict', revision}
local instance = ARGV[2]
if not redis.call('ZSCORE', leases, instance) then return {'expired'} end
-- Draining already: perhaps by this very call, whose answer was lost.
if redis.call('HGET', states, instance) == 'draining' then return {'done', current()} end
if tonumber(ARGV[3]) ~= current() then return {'conflict', current()} end
redis.call('HSET', states, instance, 'draining')
return {'done', raise_revision()}
