-- A host says what waits: all of it as a number, the first in line one by one.
-- KEYS: host, load, tickets, claims      ARGV: prefix, id, term, host lease in ms, tickets, load record, ring (0 or 1),
--                                              number gone, gone fields..., (field, ms waited, record)...
-- Returns 1, or 0 when the term is over.
local prefix, id, term = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', KEYS[1], 'term') ~= term then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local at = 8
for i = at + 1, at + ARGV[at] do
  redis.call('HDEL', KEYS[3], ARGV[i])
  redis.call('HDEL', KEYS[4], ARGV[i])
end
for i = at + ARGV[at] + 1, #ARGV, 3 do
  redis.call('HSET', KEYS[3], ARGV[i], string.format('%d ', now - ARGV[i + 1]) .. ARGV[i + 2])
end
redis.call('PEXPIRE', KEYS[3], ARGV[4])
redis.call('HSET', KEYS[1], 'load', ARGV[6])
if ARGV[5] == '0' then
  redis.call('ZREM', KEYS[2], id)
else
  redis.call('ZADD', KEYS[2], ARGV[5], id)
end
if ARGV[7] == '1' then redis.call('PUBLISH', prefix .. 'bell', id) end
return 1
