-- KEYS  1 all (zset: job ids by submission)  2 what a job's key begins with; same hash tag, so the same node
-- ARGV  1 most jobs wanted
-- Answer  {'done', {id, record}, ...}, newest first
local answer = {'done'}
for _, id in ipairs(redis.call('ZREVRANGE', KEYS[1], 0, ARGV[1] - 1)) do
  local record = redis.call('HGETALL', KEYS[2] .. id)
  -- A job that ended long ago has been forgotten.
  if #record == 0 then redis.call('ZREM', KEYS[1], id) else answer[#answer + 1] = {id, record} end
end
return answer
