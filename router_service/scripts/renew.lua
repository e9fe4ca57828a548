-- Answer  {'done', length, cancelled} | {'unknown'} | {'behind', fence} | {'stale', fence} | {'released'}
local no = refusal()
if no then return no end
prolong_lease()
return {'done', length(), redis.call('HEXISTS', meta, 'cancelled')}
