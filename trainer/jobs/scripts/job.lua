-- What every script about one job begins with.
-- KEYS  1 job (hash)  2 open (zset: job ids by when they may be claimed, in ms)  3 all (zset: job ids by submission)
-- ARGV  1 job id  2 time to live of ended jobs in ms  then the script's own, from ARGV[3] on
local job, open, all = KEYS[1], KEYS[2], KEYS[3]
local id, ttl_ms = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function get(field)
  return redis.call('HGET', job, field) or nil
end

local function record()
  return redis.call('HGETALL', job)
end

-- Every change is counted, so that who watches need not compare.
local function set(...)
  redis.call('HSET', job, ...)
  redis.call('HINCRBY', job, 'revision', 1)
end

-- The refusal that a worker with this fence must be given, or nil if the job is its own.
local function refusal(fence)
  local known = redis.call('HMGET', job, 'state', 'fence')
  if not known[1] then return {'unknown'} end
  if known[2] ~= fence or known[1] ~= 'running' then return {'stale', known[2], known[1]} end
  return nil
end

local function put_in_queue(reason, delay_ms)
  set('state', 'queued', 'reason', reason, 'owner', '')
  redis.call('ZADD', open, now_ms + delay_ms, id)
end

local function close(state, reason)
  set('state', state, 'reason', reason, 'owner', '', 'cancel', '', 'ended_ms', now_ms)
  if state ~= 'succeeded' then redis.call('HSET', job, 'checkpoint_id', '') end
  redis.call('ZREM', open, id)
  redis.call('PEXPIRE', job, ttl_ms)
end

-- A checkpoint that was committed to is published by whoever comes next; nothing else may become of the job.
local function is_committed()
  return get('checkpoint_id') ~= ''
end

-- What becomes of a job whose worker has died: cancelled if somebody wished so, failed if it happens again and
-- again, else nil: it may go on. How often it happened is counted.
local function after_death(reason, max_deaths)
  if is_committed() then return nil end
  local deaths = redis.call('HINCRBY', job, 'deaths', 1)
  if get('cancel') ~= '' then
    close('cancelled', 'on request; the worker had died: ' .. reason)
    return 'cancelled'
  end
  if deaths >= tonumber(max_deaths) then
    close('failed', 'the worker died ' .. deaths .. ' times, the last time: ' .. reason)
    return 'failed'
  end
  return nil
end
