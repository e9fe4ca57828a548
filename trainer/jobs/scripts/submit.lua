-- Queues a job, unless its id is there already.
-- ARGV  3 kind  4 configuration  5 unique for this call
-- Answer  {'done' | 'known', record} | {'reused'}
local known = redis.call('HMGET', job, 'kind', 'config', 'submission')
if known[1] then
  if known[1] ~= ARGV[3] or known[2] ~= ARGV[4] then return {'reused'} end
  return {known[3] == ARGV[5] and 'done' or 'known', record()}
end
-- The clock, not 1: a job that was forgotten and comes back must not repeat fences.
local fence = string.format('%.0f', time[1] * 1000000 + time[2])
set('kind', ARGV[3], 'config', ARGV[4], 'submission', ARGV[5], 'submitted_ms', now_ms, 'fence', fence,
  'attempts', 0, 'deaths', 0, 'cancel', '', 'checkpoint_id', '')
put_in_queue('', 0)
redis.call('ZADD', all, now_ms, id)
redis.call('ZREMRANGEBYRANK', all, 0, -10001)
return {'done', record()}
