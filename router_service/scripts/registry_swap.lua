-- ARGV  2 slot  3 the revision that the caller has seen  4 policy  5... instances, in order
-- Answer  {'done', revision, epoch, retired instance, ...} | {'conflict', revision}
--         {'expired' | 'leaving' | 'elsewhere' | 'unequal', instance}
local name, expected = ARGV[2], ARGV[3]
local slot = read(slots, name) or {}
local chosen = {}
for i = 5, #ARGV do chosen[#chosen + 1] = ARGV[i] end

local function answer()
  return {'done', current(), whole(slot.epoch), unpack(slot.swap.retired)}
end

-- Done already: by this very call, whose answer was lost.
if slot.swap and slot.swap.expected == expected and table.concat(slot.chosen, ',') == table.concat(chosen, ',') then
  return answer()
end
if tonumber(expected) ~= current() then return {'conflict', current()} end
local weights
for _, instance in ipairs(chosen) do
  if not redis.call('ZSCORE', leases, instance) then return {'expired', instance} end
  local fact = read(facts, instance)
  if fact.slot ~= name then return {'elsewhere', instance} end
  if fact.leaving then return {'leaving', instance} end
  if weights and weights ~= fact.weights then return {'unequal', instance} end
  weights = fact.weights
end
local retired = decide(name, slot, chosen, tonumber(ARGV[4]))
slot.swap = {expected = expected, retired = retired}
write(slots, name, slot)
keep_alive()
raise_revision()
return answer()
