-- Appends a turn's prompt and remembers how its answer is made. Tokens that are there stay there.
-- ARGV  5 position  6 prompt records  7 request id  8 parameters  9 seed  10 combine  11 checkpoint
-- Answer  {'done' | 'known', answer position, length} | {'gap' | 'conflict', length}
--         | {'unknown'} | {'behind', fence} | {'stale', fence} | {'released'}
local no = refusal()
if no then return no end
local turn = redis.call('HMGET', meta, 'request_id', 'turn_fence', 'answer_position')
if turn[1] == ARGV[7] then
  prolong_lease()
  -- Under the same fence it is this call, whose answer was lost; under another it is an earlier one.
  return {turn[2] == fence and 'done' or 'known', tonumber(turn[3]), length()}
end
local missing = tonumber(ARGV[5]) - length()
if missing ~= 0 then return {missing > 0 and 'gap' or 'conflict', length()} end
put(length(), ARGV[6])
redis.call('HDEL', meta, 'finish_reason', 'stop', 'cancelled')
redis.call('HSET', meta, 'state', 'running', 'request_id', ARGV[7], 'turn_fence', fence,
  'answer_position', length(), 'parameters', ARGV[8], 'seed', ARGV[9], 'combine', ARGV[10],
  'checkpoint', ARGV[11])
prolong_lease()
return {'done', length(), length()}
