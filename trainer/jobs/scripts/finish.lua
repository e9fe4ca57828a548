-- Ends a job.
-- ARGV  3 fence  4 state  5 reason
-- Answer  {'done'} | {'stale', fence, state} | {'unknown'}
local no = refusal(ARGV[3])
if no then
  -- This very call, whose answer was lost.
  if get('fence') == ARGV[3] and get('state') == ARGV[4] and get('reason') == ARGV[5] then return {'done'} end
  return no
end
close(ARGV[4], ARGV[5])
return {'done'}
