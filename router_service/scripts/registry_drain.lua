-- ARGV  2 instance  3 the revision that the caller has seen  4 policy
-- Answer  {'done', revision} | {'expired'} | {'standby'} | {'conflict', revision}
local instance = ARGV[2]
if not redis.call('ZSCORE', leases, instance) then return {'expired'} end
local fact = read(facts, instance)
if fact.state == 'standby' then return {'standby'} end
-- Draining already: perhaps by this very call, whose answer was lost.
if fact.state == 'draining' and fact.policy == tonumber(ARGV[4]) then return {'done', current()} end
if tonumber(ARGV[3]) ~= current() then return {'conflict', current()} end
fact.state, fact.policy = 'draining', tonumber(ARGV[4])
write(facts, instance, fact)
local slot = read(slots, fact.slot) or {}
retire(slot, instance, fact)
write(slots, fact.slot, slot)
keep_alive()
return {'done', raise_revision()}
