-- Who has the most that waits, and what.
-- KEYS: load sets...                     ARGV: prefix, id, least tickets, hosts per set
-- Returns {ms now, hosts}, each host {id, term, record, load, fields and values of its tickets, claimed fields}.
-- A member of a set whose host is dead is removed from it.
local prefix, id = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local hosts = {}
for _, key in ipairs(KEYS) do
  for _, other in ipairs(redis.call('ZREVRANGEBYSCORE', key, '+inf', ARGV[3], 'LIMIT', 0, ARGV[4] + 1)) do
    local found = redis.call('HMGET', prefix .. 'host:' .. other, 'term', 'record', 'load')
    if not found[1] then
      redis.call('ZREM', key, other)
    elseif other ~= id then
      local claimed = {}
      local claims = redis.call('HGETALL', prefix .. 'claims:' .. other .. ':' .. found[1])
      for i = 1, #claims, 2 do
        if redis.call('EXISTS', prefix .. 'lease:' .. claims[i + 1]) == 1 then claimed[#claimed + 1] = claims[i] end
      end
      hosts[#hosts + 1] = {
        other, found[1], found[2] or '', found[3] or '',
        redis.call('HGETALL', prefix .. 'tickets:' .. other .. ':' .. found[1]), claimed
      }
    end
  end
end
return {time[1] * 1000 + math.floor(time[2] / 1000), hosts}
