-- An origin returns leases: their requests are over, or it declines what was offered.
-- ARGV: prefix, host lease in ms, (lease, thief, letter)...
-- Returns how many of the thieves are members.
local prefix, told = ARGV[1], 0
for i = 3, #ARGV, 3 do
  local lease, thief = ARGV[i], ARGV[i + 1]
  redis.call('DEL', prefix .. 'lease:' .. lease)
  redis.call('HDEL', prefix .. 'lent:' .. thief, lease)
  local term = redis.call('HGET', prefix .. 'host:' .. thief, 'term')
  if term then
    local inbox = prefix .. 'inbox:' .. thief .. ':' .. term
    redis.call('RPUSH', inbox, ARGV[i + 2])
    redis.call('PEXPIRE', inbox, ARGV[2])
    redis.call('PUBLISH', prefix .. 'wake:' .. thief, '')
    told = told + 1
  end
end
return told
