-- A host empties its inbox.
-- KEYS: host, inbox                      ARGV: term, most letters
-- Returns the letters, oldest first, or nil when the term is over.
if redis.call('HGET', KEYS[1], 'term') ~= ARGV[1] then return false end
local letters = redis.call('LRANGE', KEYS[2], 0, ARGV[2] - 1)
redis.call('LTRIM', KEYS[2], ARGV[2], -1)
return letters
