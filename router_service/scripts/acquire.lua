-- Makes `owner` the session's only writer. The same owner again keeps its fence.
-- KEYS  1 meta  2 tok  3 lease
-- ARGV  1 owner  2 lease in ms  3 time to live in ms  4 '1' = create the session if it is unknown
-- Answer  {'done', fence, length} | {'held', ms left} | {'unknown'}
local meta, tok, lease = KEYS[1], KEYS[2], KEYS[3]
local owner, lease_ms, ttl_ms, create = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'

local known = redis.call('HMGET', meta, 'fence', 'owner')
local fence = known[1]
if not fence then
  if not create then return {'unknown'} end
  -- The clock, not 1: an id that was forgotten and comes back must not repeat fences that experts have seen.
  local now = redis.call('TIME')
  fence = string.format('%.0f', now[1] * 1000000 + now[2])
  redis.call('DEL', tok, lease)
  redis.call('HSET', meta, 'fence', fence, 'owner', owner)
elseif known[2] ~= owner then
  if redis.call('EXISTS', lease) == 1 then return {'held', redis.call('PTTL', lease)} end
  redis.call('HINCRBY', meta, 'fence', 1)
  redis.call('HSET', meta, 'owner', owner)
  fence = redis.call('HGET', meta, 'fence')
end
redis.call('SET', lease, owner, 'PX', lease_ms)
redis.call('PEXPIRE', meta, ttl_ms)
redis.call('PEXPIRE', tok, tonumber(ttl_ms) + 1000)
return {'done', fence, redis.call('STRLEN', tok) / 16}
