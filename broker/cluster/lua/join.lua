-- A host begins a term; everything of its terms before is void.
-- KEYS: host, members, load, lent        ARGV: prefix, id, term, record, host lease in ms
-- Returns a flat list of what it had lent and is still in use: lease, what it noted about it, ms left, ...
local prefix, id, term = ARGV[1], ARGV[2], ARGV[3]
local before = redis.call('HGET', KEYS[1], 'term')
if before then
  for _, kind in ipairs({'tickets:', 'claims:', 'inbox:'}) do
    redis.call('DEL', prefix .. kind .. id .. ':' .. before)
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'term', term, 'record', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000), id)
redis.call('ZREM', KEYS[3], id)
local kept = {}
local lent = redis.call('HGETALL', KEYS[4])
for i = 1, #lent, 2 do
  local left = redis.call('PTTL', prefix .. 'lease:' .. lent[i])
  if left > 0 then
    kept[#kept + 1] = lent[i]
    kept[#kept + 1] = lent[i + 1]
    kept[#kept + 1] = left
  else
    redis.call('HDEL', KEYS[4], lent[i])
  end
end
redis.call('PUBLISH', prefix .. 'bell', id)
return kept
