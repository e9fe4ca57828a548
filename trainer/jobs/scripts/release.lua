-- Gives a job back to the queue: its worker stops, or has died.
-- ARGV  3 fence  4 reason  5 ms until it may be claimed  6 deaths that a job may have, or '' = this was none
-- Answer  {'done', state} | {'stale', fence, state} | {'unknown'}
local no = refusal(ARGV[3])
if no then
  -- This very call, whose answer was lost.
  if get('released') == ARGV[3] then return {'done', get('state')} end
  return no
end
redis.call('HSET', job, 'released', ARGV[3])
if ARGV[6] ~= '' then
  local ended_as = after_death(ARGV[4], ARGV[6])
  if ended_as then return {'done', ended_as} end
elseif get('cancel') ~= '' and not is_committed() then
  close('cancelled', 'on request')
  return {'done', 'cancelled'}
end
put_in_queue(ARGV[4], ARGV[5])
return {'done', 'queued'}
