-- Asks the writer of the running turn to stop; it learns so from its next append or renewal.
-- KEYS  1 meta  2 tok  3 lease
-- Answer  {'done' | 'idle', lease ms left} | {'unknown'}
local meta, lease = KEYS[1], KEYS[3]
local state = redis.call('HMGET', meta, 'fence', 'state')
if not state[1] then return {'unknown'} end
if state[2] ~= 'running' then return {'idle', 0} end
redis.call('HSET', meta, 'cancelled', '1')
return {'done', math.max(redis.call('PTTL', lease), 0)}
