-- Ends a job that waits; asks the worker of a running one to stop.
-- ARGV  3 'save' | 'discard'
-- Answer  {'done' | 'late' | 'over', record} | {'unknown'}
local state = get('state')
if not state then return {'unknown'} end
if state ~= 'queued' and state ~= 'running' then return {'over', record()} end
if is_committed() then return {'late', record()} end
if state == 'queued' then
  close('cancelled', 'on request')
elseif get('cancel') ~= ARGV[3] then
  set('cancel', ARGV[3], 'reason', 'asked to stop')
end
return {'done', record()}
