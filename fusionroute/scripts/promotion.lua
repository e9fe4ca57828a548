-- What every script of the promotion begins with.
-- KEYS  1 promotion (hash): revision, from (the revision before), verb ('promote' or 'rollback'),
--         checkpoint_id, fingerprint, previous (JSON: [[checkpoint_id, fingerprint], ...], the latest one last)
local key = KEYS[1]
local known = redis.call('HMGET', key, 'revision', 'from', 'verb', 'checkpoint_id', 'fingerprint', 'previous')
local revision, from, verb = known[1] or '0', known[2], known[3]
local checkpoint_id, fingerprint = known[4] or '', known[5] or ''
local previous = cjson.decode(known[6] or '[]')

local function encoded(list)
  return #list == 0 and '[]' or cjson.encode(list)
end

local function answer(verdict)
  return {verdict, revision, checkpoint_id, fingerprint, encoded(previous)}
end

local function change(new_verb, new_id, new_fingerprint)
  from, verb, checkpoint_id, fingerprint = revision, new_verb, new_id, new_fingerprint
  -- Starts at the clock, so that a Redis that was lost does not repeat revisions that somebody has seen.
  local start = revision == '0' and tonumber(redis.call('TIME')[1]) or tonumber(revision)
  revision = string.format('%.0f', start + 1)
  redis.call('HSET', key, 'revision', revision, 'from', from, 'verb', verb, 'checkpoint_id', checkpoint_id,
    'fingerprint', fingerprint, 'previous', encoded(previous))
end
