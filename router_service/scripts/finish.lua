-- Closes the turn, provided that nothing of it is missing, and gives the lease back.
-- ARGV  5 length that the session must have  6 finish reason  7 stop string that ended it, or ''
-- Answer  {'done' | 'gap' | 'conflict', length} | {'unknown'} | {'behind', fence} | {'stale', fence} | {'released'}
local turn = redis.call('HMGET', meta, 'fence', 'state', 'finish_reason', 'turn_fence')
if turn[1] == fence and turn[2] == 'finished' and turn[3] == ARGV[6] and turn[4] == fence then
  return {'done', length()}
end
local no = refusal()
if no then return no end
local missing = tonumber(ARGV[5]) - length()
if missing ~= 0 then return {missing > 0 and 'gap' or 'conflict', length()} end
redis.call('HSET', meta, 'state', 'finished', 'finish_reason', ARGV[6], 'stop', ARGV[7],
  'turn_fence', fence, 'owner', '')
redis.call('HDEL', meta, 'cancelled')
redis.call('DEL', lease)
keep_alive()
return {'done', length()}
