-- ARGV  3 the revision that the caller knows, or ''
-- Answer  {'same'} | {'done', record} | {'unknown'}
local revision = get('revision')
if not revision then return {'unknown'} end
if revision == ARGV[3] then return {'same'} end
return {'done', record()}
