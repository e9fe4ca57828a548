-- What every script of the registry begins with: who has not renewed its lease is out.
-- KEYS  1 revision (string)  2 entries (hash: instance -> message)  3 leases (zset: instance by end, in ms)
--       4 facts (hash: instance -> JSON)  5 loads (hash: instance -> message)  6 addresses (hash)
--       7 slots (hash: slot -> JSON)
-- ARGV  1 time to live in ms  then the script's own, from ARGV[2] on
--
-- A fact    slot, weights, loaded (its load epoch), state, epoch, policy (how it drains), leaving (about to stop)
-- A slot    what was decided last, and outlives leases: epoch, weights, newest (latest load that the decision knew),
--           chosen (who serves), places (their addresses), retired (instance -> epoch under which it served, weights,
--           address, when); the latest swap or its undoing
local revision, entries, leases, facts, loads, addresses, slots = unpack(KEYS)
local ttl_ms = ARGV[1]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local MIGRATE = 1
local MAX_RETIRED = 100
local RESTART_MS = 600000  -- a process that is started again within so long is still what it was

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
  for _, key in ipairs({entries, facts, loads, addresses}) do redis.call('HDEL', key, instance) end
  return existed == 1
end

local function read(hash, name)
  local text = redis.call('HGET', hash, name)
  return text and cjson.decode(text)
end

local function write(hash, name, value)
  redis.call('HSET', hash, name, cjson.encode(value))
end

local function whole(number)
  return string.format('%.0f', number)
end

-- The living instances of a slot: names in order, and facts by name.
local function living(name)
  local names, by_name = {}, {}
  for _, instance in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
    local fact = read(facts, instance)
    if fact.slot == name then
      names[#names + 1] = instance
      by_name[instance] = fact
    end
  end
  table.sort(names)
  return names, by_name
end

-- Remembers who was told to drain, so that it cannot serve again by registering again.
local function retire(slot, instance, fact)
  slot.retired = slot.retired or {}
  slot.retired[instance] = {epoch = fact.epoch, weights = fact.weights, at = now_ms,
    address = redis.call('HGET', addresses, instance)}
  local num_retired = 0
  for _ in pairs(slot.retired) do num_retired = num_retired + 1 end
  for each in pairs(slot.retired) do
    if num_retired > MAX_RETIRED and each ~= instance and not redis.call('ZSCORE', leases, each) then
      slot.retired[each] = nil
      num_retired = num_retired - 1
    end
  end
end

-- From now on the chosen living instances serve the slot, under a new epoch; whoever served it drains.
-- Writes the facts and returns who was retired; the caller writes the slot.
local function decide(name, slot, chosen, policy)
  slot.epoch = math.max((slot.epoch or 0) + 1, now_ms)
  slot.chosen, slot.places, slot.swap, slot.undone = chosen, {}, nil, nil
  local is_chosen, retired = {}, {}
  for _, instance in ipairs(chosen) do is_chosen[instance] = true end
  local names, by_name = living(name)
  for _, instance in ipairs(names) do
    local fact = by_name[instance]
    if is_chosen[instance] then
      fact.state, fact.epoch, fact.policy = 'ready', slot.epoch, 0
      slot.weights = fact.weights
      slot.places[#slot.places + 1] = redis.call('HGET', addresses, instance)
      if slot.retired then slot.retired[instance] = nil end
    elseif fact.state == 'ready' then
      fact.state, fact.policy = 'draining', policy
      retire(slot, instance, fact)
      retired[#retired + 1] = instance
    end
    if tonumber(fact.loaded) > tonumber(slot.newest or 0) then slot.newest = fact.loaded end
    write(facts, instance, fact)
  end
  return retired
end

local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms)
for _, instance in ipairs(expired) do remove(instance) end
if #expired > 0 then raise_revision() end
