-- Everything known of a session, its tokens from a position on.
-- KEYS  1 meta  2 tok  3 lease  4 gone
-- ARGV  1 first position wanted
-- Answer  {'done', fields and values, length, records, ms until it is forgotten, lease ms left}
--         | {'unknown'} | {'deleted'}
local meta, tok, lease, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local fields = redis.call('HGETALL', meta)
if #fields == 0 then return {redis.call('EXISTS', gone) == 1 and 'deleted' or 'unknown'} end
return {'done', fields, redis.call('STRLEN', tok) / 16, redis.call('GETRANGE', tok, ARGV[1] * 16, -1),
  redis.call('PTTL', meta), math.max(redis.call('PTTL', lease), 0)}
