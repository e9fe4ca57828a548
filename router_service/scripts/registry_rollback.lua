-- ARGV  2 slot  3 the revision that the caller has seen  4 policy
-- Answer  {'done', revision, epoch, instance that serves again, ...} | {'conflict', revision} | {'nothing'}
local name, expected = ARGV[2], ARGV[3]
local slot = read(slots, name) or {}

local function answer()
  return {'done', current(), whole(slot.epoch), unpack(slot.chosen)}
end

-- Done already: by this very call, whose answer was lost.
if slot.undone and slot.undone.expected == expected then return answer() end
if tonumber(expected) ~= current() then return {'conflict', current()} end
local chosen = {}
for _, instance in ipairs(slot.swap and slot.swap.retired or {}) do
  local fact = redis.call('ZSCORE', leases, instance) and read(facts, instance)
  if fact and not fact.leaving then chosen[#chosen + 1] = instance end
end
if #chosen == 0 then return {'nothing'} end
decide(name, slot, chosen, tonumber(ARGV[4]))
slot.undone = {expected = expected}
write(slots, name, slot)
keep_alive()
raise_revision()
return answer()
