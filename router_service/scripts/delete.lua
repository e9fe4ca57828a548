-- Forgets a session, and remembers for a while that this was meant: its writer must not put it back.
-- KEYS  1 meta  2 tok  3 lease  4 gone
-- ARGV  1 how long that is remembered, ms
-- Answer  {'done' | 'absent'}
local meta, gone = KEYS[1], KEYS[4]
local now = redis.call('TIME')
local fence = tonumber(redis.call('HGET', meta, 'fence') or '0')
-- Writers up to this fence are meant; the session may be begun anew.
redis.call('SET', gone, string.format('%.0f', math.max(fence, now[1] * 1000000 + now[2])), 'PX', ARGV[1])
local existed = redis.call('EXISTS', meta) == 1
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return {existed and 'done' or 'absent'}
