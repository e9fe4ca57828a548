-- What every script of the registry begins with: who has not renewed its lease is out.
-- KEYS  1 revision (string)  2 entries (hash: instance -> message)  3 leases (zset: instance by end, in ms)
--       4 states (hash)  5 loads (hash: instance -> message)  6 addresses (hash)
-- ARGV  1 time to live in ms  then the script's own, from ARGV[2] on
local revision, entries, leases, states, loads, addresses = unpack(KEYS)
local ttl_ms = ARGV[1]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function current()
  return tonumber(redis.call('GET', revision) or 0)
end

-- Starts at the clock, so that a registry that was lost does not repeat revisions that somebody has seen.
local function raise_revision()
  redis.call('SET', revision, time[1], 'NX')
  return redis.call('INCR', revision)
end

local function keep_alive()
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ttl_ms) end
end

local function renew(instance, lease_ms)
  redis.call('ZADD', leases, now_ms + lease_ms, instance)
  keep_alive()
end

local function remove(instance)
  local existed = redis.call('ZREM', leases, instance)
  for _, key in ipairs({entries, states, loads, addresses}) do redis.call('HDEL', key, instance) end
  return existed == 1
end

local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms)
for _, instance in ipairs(expired) do remove(instance) end
if #expired > 0 then raise_revision() end
