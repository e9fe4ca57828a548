-- ARGV  1 expected revision
-- Answer  {'done' | 'conflict' | 'nothing', revision, checkpoint_id, fingerprint, previous}
local is_repeated = from == ARGV[1] and verb == 'rollback'
if is_repeated then return answer('done') end
if revision ~= ARGV[1] then return answer('conflict') end
if #previous == 0 then return answer('nothing') end
local before = table.remove(previous)
change('rollback', before[1], before[2])
return answer('done')
