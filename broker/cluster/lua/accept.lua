-- An origin accepts offers: from here on the lease is its own, and the ticket's version is used up.
-- KEYS: host, tickets, claims            ARGV: prefix, term, lease in ms, (lease, field)...
-- Returns nil when the term is over. Else for each 1, or 0 when the offer is over, or another one was accepted.
local prefix = ARGV[1]
if redis.call('HGET', KEYS[1], 'term') ~= ARGV[2] then return false end
local accepted = {}
for i = 4, #ARGV, 2 do
  local lease, field = prefix .. 'lease:' .. ARGV[i], ARGV[i + 1]
  if redis.call('GET', lease) == 'offered' and redis.call('HGET', KEYS[3], field) == ARGV[i] then
    redis.call('SET', lease, 'taken', 'PX', ARGV[3])
    redis.call('HDEL', KEYS[2], field)
    redis.call('HDEL', KEYS[3], field)
    accepted[#accepted + 1] = 1
  else
    accepted[#accepted + 1] = 0
  end
end
return accepted
