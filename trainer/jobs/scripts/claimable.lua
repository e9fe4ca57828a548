-- KEYS  1 open (zset: job ids by when they may be claimed, in ms)
-- ARGV  1 most ids wanted
-- Answer  {'done', id, ...}, who has waited longest first
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, ARGV[1])
table.insert(answer, 1, 'done')
return answer
