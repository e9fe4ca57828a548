-- Makes `owner` the session's only writer. The same owner again keeps its fence.
-- KEYS  1 meta  2 tok  3 lease  4 gone
-- ARGV  1 owner  2 lease in ms  3 time to live in ms  4 '1' = create the session if it is unknown
-- Answer  {'done', fence, length} | {'held', ms left} | {'unknown'}
local meta, tok, lease, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local owner, lease_ms, ttl_ms, create = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'

-- By the clock, so that neither an id that was forgotten and comes back nor a Redis that went back in time repeats
-- a fence that experts have seen. '%.0f': other formats of numbers round.
local function next_fence(previous)
  local now = redis.call('TIME')
  return string.format('%.0f', math.max(previous + 1, now[1] * 1000000 + now[2]))
end

local known = redis.call('HMGET', meta, 'fence', 'owner')
local fence = known[1]
if not fence then
  if not create then return {'unknown'} end
  fence = next_fence(tonumber(redis.call('GET', gone) or '0'))
  redis.call('DEL', tok, lease)
elseif known[2] ~= owner then
  if redis.call('EXISTS', lease) == 1 then return {'held', redis.call('PTTL', lease)} end
  fence = next_fence(tonumber(fence))
end
redis.call('HSET', meta, 'fence', fence, 'owner', owner)
redis.call('SET', lease, owner, 'PX', lease_ms)
redis.call('PEXPIRE', meta, ttl_ms)
redis.call('PEXPIRE', tok, tonumber(ttl_ms) + 1000)
return {'done', fence, redis.call('STRLEN', tok) / 16}
