-- Appends a turn's prompt and remembers how its answer is made. Tokens that are there stay there.
-- ARGV  4 position  5 prompt records  6 request id  7 parameters  8 seed  9 combine  10 checkpoint
-- Answer  {'done' | 'known', answer position, length} | {'gap' | 'conflict', length}
--         | {'unknown'} | {'stale', fence} | {'released'}
local no = refusal()
if no then return no end
local turn = redis.call('HMGET', meta, 'request_id', 'turn_fence', 'answer_position')
if turn[1] == ARGV[6] then
  prolong_lease()
  -- Under the same fence it is this call, whose answer was lost; under another it is an earlier one.
  return {turn[2] == fence and 'done' or 'known', tonumber(turn[3]), length()}
end
local missing = tonumber(ARGV[4]) - length()
if missing ~= 0 then return {missing > 0 and 'gap' or 'conflict', length()} end
put(length(), ARGV[5])
redis.call('HDEL', meta, 'finish_reason', 'stop', 'cancelled')
redis.call('HSET', meta, 'state', 'running', 'request_id', ARGV[6], 'turn_fence', fence,
  'answer_position', length(), 'parameters', ARGV[7], 'seed', ARGV[8], 'combine', ARGV[9],
  'checkpoint', ARGV[10])
prolong_lease()
return {'done', length(), length()}
