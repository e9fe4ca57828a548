-- Gives the lease back without closing the turn.
-- Answer  {'done'} | {'unknown'} | {'behind', fence} | {'stale', fence}
local no = refusal()
if no then
  if no[1] == 'released' then return {'done'} end
  return no
end
redis.call('HSET', meta, 'owner', '')
redis.call('DEL', lease)
keep_alive()
return {'done'}
