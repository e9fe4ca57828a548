-- ARGV  2 instance
-- Answer  {'done'} | {'expired'}
if not remove(ARGV[2]) then return {'expired'} end
raise_revision()
return {'done'}
