-- ARGV  5 position  6 records
-- Answer  {'done' | 'gap' | 'conflict', length, cancelled} | {'unknown'} | {'behind', fence} | {'stale', fence} | {'released'}
local no = refusal()
if no then return no end
local verdict = put(tonumber(ARGV[5]), ARGV[6])
prolong_lease()
return {verdict, length(), redis.call('HEXISTS', meta, 'cancelled')}
