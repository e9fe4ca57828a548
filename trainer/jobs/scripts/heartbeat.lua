-- Renews a lease, also an expired one that nobody else has taken.
-- ARGV  3 fence  4 lease in ms  5 progress, JSON, or '' = none yet
-- Answer  {'done', what a cancellation asks for, or ''} | {'stale', fence, state} | {'unknown'}
local no = refusal(ARGV[3])
if no then return no end
if ARGV[5] ~= '' and ARGV[5] ~= get('progress') then set('progress', ARGV[5]) end
redis.call('ZADD', open, now_ms + ARGV[4], id)
return {'done', get('cancel')}
