-- Puts a session back that Redis has lost, wholly or in part, as its writer holds it.
-- ARGV  5 all records  6 request id  7 answer position  8 parameters  9 seed  10 combine  11 checkpoint
-- Answer  {'done' | 'conflict', length, cancelled} | {'deleted'} | {'stale', fence} | {'released'}
local no = refusal()
if no and no[1] == 'unknown' and tonumber(redis.call('GET', gone) or '0') >= tonumber(fence) then
  return {'deleted'}
end
if no and (no[1] == 'stale' or no[1] == 'released') then return no end
-- What an earlier writer left: this one has succeeded it, and knew of all that it had been told was stored.
if no then redis.call('DEL', tok) end
local verdict = put(0, ARGV[5])
if verdict == 'done' then
  if redis.call('HGET', meta, 'request_id') ~= ARGV[6] then redis.call('HDEL', meta, 'cancelled') end
  redis.call('HSET', meta, 'fence', fence, 'owner', owner, 'state', 'running', 'request_id', ARGV[6],
    'turn_fence', fence, 'answer_position', ARGV[7], 'parameters', ARGV[8], 'seed', ARGV[9],
    'combine', ARGV[10], 'checkpoint', ARGV[11])
  redis.call('HDEL', meta, 'finish_reason', 'stop')
end
prolong_lease()
return {verdict, length(), redis.call('HEXISTS', meta, 'cancelled')}
