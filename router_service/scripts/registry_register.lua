-- ARGV  2 instance  3 entry  4 address  5 lease in ms
-- Answer  {'done', revision}
local instance, entry, address = ARGV[2], ARGV[3], ARGV[4]
local is_changed = redis.call('HGET', entries, instance) ~= entry
local known = redis.call('HGETALL', addresses)
for i = 1, #known, 2 do
  -- An address has one process behind it; whoever was there before is gone.
  if known[i + 1] == address and known[i] ~= instance then
    remove(known[i])
    is_changed = true
  end
end
redis.call('HSET', entries, instance, entry)
redis.call('HSET', addresses, instance, address)
redis.call('HSETNX', states, instance, 'ready')
if is_changed then raise_revision() end
renew(instance, ARGV[5])
return {'done', current()}
