-- A host ends its term in order; what it has lent goes on until its leases end.
-- KEYS: host, members, load              ARGV: prefix, id, term
-- Returns 1, or 0 when the term was over already.
local prefix, id, term = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', KEYS[1], 'term') ~= term then return 0 end
redis.call('DEL', KEYS[1])
for _, kind in ipairs({'tickets:', 'claims:', 'inbox:'}) do
  redis.call('DEL', prefix .. kind .. id .. ':' .. term)
end
redis.call('ZREM', KEYS[2], id)
redis.call('ZREM', KEYS[3], id)
return 1
