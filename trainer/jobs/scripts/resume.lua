-- Queues a cancelled or failed job again. A job that waits or runs stays as it is.
-- Answer  {'done', record} | {'stopping' | 'over', record} | {'unknown'}
local state = get('state')
if not state then return {'unknown'} end
if state == 'running' and get('cancel') ~= '' then return {'stopping', record()} end
if state == 'succeeded' then return {'over', record()} end
if state == 'cancelled' or state == 'failed' then
  redis.call('HDEL', job, 'ended_ms')
  redis.call('HSET', job, 'deaths', 0, 'cancel', '')
  redis.call('PERSIST', job)
  put_in_queue('', 0)
end
return {'done', record()}
