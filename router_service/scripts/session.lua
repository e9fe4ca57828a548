-- What every script that writes to a session begins with.
-- KEYS  1 meta (hash)  2 tok (string of 16-byte records)  3 lease (string: the owner)  4 gone (string: a fence)
-- ARGV  1 fence  2 lease in ms  3 time to live in ms  4 owner  then the script's own, from ARGV[5] on
local meta, tok, lease, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local fence, lease_ms, ttl_ms, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local RECORD_BYTES = 16

local function length()
  return redis.call('STRLEN', tok) / RECORD_BYTES
end

-- The refusal that this writer must be given, or nil if it may write. A fence lower than the writer's means that
-- Redis has lost what it knew: fences are microseconds, which a number of Lua holds exactly.
local function refusal()
  local known = redis.call('HMGET', meta, 'fence', 'owner')
  if not known[1] then return {'unknown'} end
  if tonumber(known[1]) < tonumber(fence) then return {'behind', known[1]} end
  if known[1] ~= fence then return {'stale', known[1]} end
  if known[2] == '' then return {'released'} end
  if known[2] ~= owner then return {'stale', known[1]} end
  return nil
end

-- The tokens live a little longer than what describes them, so that they cannot be missing first.
local function keep_alive()
  redis.call('PEXPIRE', meta, ttl_ms)
  redis.call('PEXPIRE', tok, tonumber(ttl_ms) + 1000)
end

-- A writer that writes is alive.
local function prolong_lease()
  redis.call('SET', lease, owner, 'PX', lease_ms)
  keep_alive()
end

-- Puts `records` at `position`. What is there already must be the same bytes; what goes on is appended.
local function put(position, records)
  local offset, stored = position * RECORD_BYTES, redis.call('STRLEN', tok)
  if offset > stored then return 'gap' end
  local overlap = math.min(stored - offset, #records)
  if overlap > 0
    and redis.call('GETRANGE', tok, offset, offset + overlap - 1) ~= string.sub(records, 1, overlap) then
    return 'conflict'
  end
  if overlap < #records then redis.call('APPEND', tok, string.sub(records, overlap + 1)) end
  return 'done'
end
