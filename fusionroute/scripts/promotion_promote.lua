-- ARGV  1 expected revision  2 checkpoint id  3 fingerprint  4 most checkpoints to remember
-- Answer  {'done' | 'conflict', revision, checkpoint_id, fingerprint, previous}
local is_repeated = from == ARGV[1] and verb == 'promote' and checkpoint_id == ARGV[2]
if is_repeated then return answer('done') end
if revision ~= ARGV[1] then return answer('conflict') end
if checkpoint_id == ARGV[2] then return answer('done') end
table.insert(previous, {checkpoint_id, fingerprint})
if #previous > tonumber(ARGV[4]) then table.remove(previous, 1) end
change('promote', ARGV[2], ARGV[3])
return answer('done')
