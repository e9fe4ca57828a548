-- The point of no return: from here on the job succeeds with this checkpoint, whoever carries it out.
-- ARGV  3 fence  4 checkpoint id
-- Answer  {'done'} | {'cancelled'} | {'stale', fence, state} | {'unknown'}
local no = refusal(ARGV[3])
if no then return no end
if get('checkpoint_id') == ARGV[4] then return {'done'} end
if get('cancel') ~= '' then return {'cancelled'} end
set('checkpoint_id', ARGV[4])
return {'done'}
