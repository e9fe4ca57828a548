-- ARGV  4 position  5 records
-- Answer  {'done' | 'gap' | 'conflict', length, cancelled} | {'unknown'} | {'stale', fence} | {'released'}
local no = refusal()
if no then return no end
local verdict = put(tonumber(ARGV[4]), ARGV[5])
prolong_lease()
return {verdict, length(), redis.call('HEXISTS', meta, 'cancelled')}
