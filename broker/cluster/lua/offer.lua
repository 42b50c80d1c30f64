-- A thief offers a place for one version of one ticket: the first one to come is heard.
-- KEYS: the thief's host and lent, the origin's host, tickets, claims and inbox, the lease
-- ARGV: prefix, thief's term, origin, its term, field, lease, note of the thief, offer's lease in ms, letter,
--       most letters, ms that lent is kept, host lease in ms
-- Returns 1, or 0 when the ticket waits no more, 2 when another thief was first, 3 when the thief's own term is over.
local prefix, field, lease = ARGV[1], ARGV[5], ARGV[6]
if redis.call('HGET', KEYS[1], 'term') ~= ARGV[2] then return 3 end
if redis.call('HGET', KEYS[3], 'term') ~= ARGV[4] then return 0 end
if redis.call('HEXISTS', KEYS[4], field) == 0 then return 0 end
if redis.call('LLEN', KEYS[6]) >= tonumber(ARGV[10]) then return 0 end
local first = redis.call('HGET', KEYS[5], field)
if first and redis.call('EXISTS', prefix .. 'lease:' .. first) == 1 then return 2 end
redis.call('HSET', KEYS[5], field, lease)
redis.call('PEXPIRE', KEYS[5], ARGV[12])
redis.call('SET', KEYS[7], 'offered', 'PX', ARGV[8])
redis.call('HSET', KEYS[2], lease, ARGV[7])
redis.call('PEXPIRE', KEYS[2], ARGV[11])
redis.call('RPUSH', KEYS[6], ARGV[9])
redis.call('PEXPIRE', KEYS[6], ARGV[12])
redis.call('PUBLISH', prefix .. 'wake:' .. ARGV[3], '')
return 1
