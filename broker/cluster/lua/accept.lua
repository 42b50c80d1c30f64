-- An origin accepts offers: from here on their leases are its own. What an offer named is used up, in this version.
-- KEYS: host, tickets, claims            ARGV: prefix, term, lease in ms, (lease, field)...
-- Returns nil when the term is over. Else for each 1, or 0 when the offer is over: accepted before, or too late.
local prefix = ARGV[1]
if redis.call('HGET', KEYS[1], 'term') ~= ARGV[2] then return false end
local accepted = {}
for i = 4, #ARGV, 2 do
  local lease = prefix .. 'lease:' .. ARGV[i]
  if redis.call('GET', lease) == 'offered' then
    redis.call('SET', lease, 'taken', 'PX', ARGV[3])
    redis.call('HDEL', KEYS[2], ARGV[i + 1])
    redis.call('HDEL', KEYS[3], ARGV[i + 1])
    accepted[#accepted + 1] = 1
  else
    accepted[#accepted + 1] = 0
  end
end
return accepted
