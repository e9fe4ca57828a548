-- KEYS  1 meta  2 tok  3 lease
-- Answer  {'done' | 'absent'}
local existed = redis.call('EXISTS', KEYS[1]) == 1
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return {existed and 'done' or 'absent'}
