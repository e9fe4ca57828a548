-- ARGV  2 the revision that the caller knows; '' = none
-- Answer  {'same', revision} | {'done', revision, {entry, state, load, ms left, epoch, policy}, ...}
if ARGV[2] == tostring(current()) then return {'same', current()} end
local answer = {'done', current()}
local known = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
for i = 1, #known, 2 do
  local instance = known[i]
  local fact = read(facts, instance)
  answer[#answer + 1] = {redis.call('HGET', entries, instance), fact.state,
    redis.call('HGET', loads, instance) or '', known[i + 1] - now_ms, whole(fact.epoch), whole(fact.policy)}
end
return answer
