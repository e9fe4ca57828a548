-- ARGV  2 the revision that the caller knows; '' = none
-- Answer  {'same', revision} | {'done', revision, {entry, state, load, ms left}, ...}
if ARGV[2] == tostring(current()) then return {'same', current()} end
local answer = {'done', current()}
local living = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
for i = 1, #living, 2 do
  local instance = living[i]
  answer[#answer + 1] = {redis.call('HGET', entries, instance), redis.call('HGET', states, instance),
    redis.call('HGET', loads, instance) or '', living[i + 1] - now_ms}
end
return answer
