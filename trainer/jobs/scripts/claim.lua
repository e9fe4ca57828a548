-- Makes `owner` the only worker of a job that waits, or whose worker has not been heard of for too long.
-- ARGV  3 owner, unique for this call  4 lease in ms  5 deaths of its worker that a job may have  6 folder
-- Answer  {'done', fence, record} | {'ended', record}, just now | {'held'} | {'over'} | {'unknown'}
local state = get('state')
if not state then
  redis.call('ZREM', open, id)
  return {'unknown'}
end
-- This very call, whose answer was lost.
if state == 'running' and get('owner') == ARGV[3] then return {'done', get('fence'), record()} end
local due_ms = redis.call('ZSCORE', open, id)
if not due_ms then return {'over'} end
if tonumber(due_ms) > now_ms then return {'held'} end
if state == 'running' then
  local ended_as = after_death('it was not heard of for the time of its lease', ARGV[5])
  if ended_as then return {'ended', record()} end
end
local fence = redis.call('HINCRBY', job, 'fence', 1)
redis.call('HINCRBY', job, 'attempts', 1)
redis.call('HSETNX', job, 'started_ms', now_ms)
set('state', 'running', 'reason', '', 'owner', ARGV[3], 'folder', ARGV[6])
redis.call('ZADD', open, now_ms + ARGV[4], id)
return {'done', get('fence'), record()}
