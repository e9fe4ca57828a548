-- ARGV  2 instance  3 entry  4 address  5 lease in ms  6 slot  7 fingerprint of the weights  8 load epoch
--       9 '1' = on standby
-- Answer  {'done', revision, state, epoch}
local instance, entry, address, name, weights, loaded = ARGV[2], ARGV[3], ARGV[4], ARGV[6], ARGV[7], ARGV[8]
local is_changed = redis.call('HGET', entries, instance) ~= entry
local known = redis.call('HGETALL', addresses)
for i = 1, #known, 2 do
  -- An address has one process behind it; whoever was there before is gone.
  if known[i + 1] == address and known[i] ~= instance then
    remove(known[i])
    is_changed = true
  end
end
redis.call('HSET', entries, instance, entry)
redis.call('HSET', addresses, instance, address)
renew(instance, ARGV[5])

local function is_among(list, wanted)
  for _, each in ipairs(list or {}) do
    if each == wanted then return true end
  end
  return false
end

-- What is known of this instance, or of its process before it was started again, if it was told to drain.
local function retirement(slot)
  local retired = slot.retired or {}
  if retired[instance] then return retired[instance] end
  for _, each in pairs(retired) do
    if each.address == address and each.weights == weights and each.weights ~= slot.weights
      and now_ms - each.at < RESTART_MS then return each end
  end
end

local function place()
  local slot = read(slots, name) or {}
  local fact = read(facts, instance)
  local was = fact and fact.slot == name and fact or {}
  fact = {slot = name, weights = weights, loaded = loaded, leaving = was.leaving,
    state = was.state, epoch = was.epoch, policy = was.policy or 0}
  local retired = retirement(slot)
  local is_current = slot.weights == weights
  -- Also when the process that was swapped in is started again as it was then, on standby.
  local is_chosen = is_current and (is_among(slot.chosen, instance) or is_among(slot.places, address))
  -- Lower than what serves now, and not that of anybody else.
  local outdated_epoch = slot.epoch and math.min(tonumber(loaded), slot.epoch - 1)
  if was.state == 'draining' or was.state == 'standby' then
    -- Only a person's decision changes that.
    if was.state == 'draining' and was.weights ~= weights then fact.epoch = outdated_epoch end
  elseif not was.state and retired then
    fact.state, fact.epoch, fact.policy = 'draining', retired.epoch, MIGRATE
  elseif not was.state and ARGV[9] == '1' and not is_chosen then
    fact.state, fact.epoch = 'standby', 0
  elseif is_current then
    fact.state, fact.epoch = 'ready', slot.epoch
    if tonumber(loaded) > tonumber(slot.newest) then slot.newest = loaded end
  elseif not slot.newest or tonumber(loaded) > tonumber(slot.newest) then
    fact.state = 'ready'
    write(facts, instance, fact)
    decide(name, slot, {instance}, MIGRATE)
    fact = read(facts, instance)
  else
    -- Newer weights have the slot.
    fact.state, fact.epoch, fact.policy = 'draining', outdated_epoch, MIGRATE
  end
  write(facts, instance, fact)
  if slot.epoch then write(slots, name, slot) end
  keep_alive()
end

if is_changed then
  place()
  raise_revision()
end
local fact = read(facts, instance)
return {'done', current(), fact.state, whole(fact.epoch)}
