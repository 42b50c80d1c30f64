-- A host says that it lives, renews the leases that its requests hold, and learns what became of those that it gave.
-- KEYS: host, members, load, lent        ARGV: prefix, id, term, host lease in ms, lease in ms, ms after which a silent
--                                              host is forgotten, most members told,
--                                              number held, held leases..., number lent, (lent lease, note)...
-- Returns nil when the term is over. Else {ms left of each lent lease (negative: it is over), members}, members being
-- a flat list without the host itself: id, record, load, ...
local prefix, id, term = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', KEYS[1], 'term') ~= term then return false end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
for _, kind in ipairs({'tickets:', 'claims:', 'inbox:'}) do
  redis.call('PEXPIRE', prefix .. kind .. id .. ':' .. term, ARGV[4])
end
redis.call('ZADD', KEYS[2], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('PEXPIRE', KEYS[3], ARGV[6])
local at = 8
for i = at + 1, at + ARGV[at] do
  -- Set, not prolonged: its request runs, whatever Redis has forgotten.
  redis.call('SET', prefix .. 'lease:' .. ARGV[i], 'taken', 'PX', ARGV[5])
end
at = at + ARGV[at] + 1
local left = {}
redis.call('DEL', KEYS[4])
for i = at + 1, at + 2 * ARGV[at], 2 do
  left[#left + 1] = redis.call('PTTL', prefix .. 'lease:' .. ARGV[i])
  redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[4], ARGV[6])
local members = {}
for _, other in ipairs(redis.call('ZREVRANGE', KEYS[2], 0, ARGV[7])) do
  if other ~= id then
    local found = redis.call('HMGET', prefix .. 'host:' .. other, 'term', 'record', 'load')
    if found[1] then
      members[#members + 1] = other
      members[#members + 1] = found[2] or ''
      members[#members + 1] = found[3] or ''
    end
  end
end
return {left, members}
