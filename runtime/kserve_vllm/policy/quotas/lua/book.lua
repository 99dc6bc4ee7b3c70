-- Books what came of earlier takes.
--
-- KEYS: a counter each. ARGV: width of a bucket in us, whole buckets per window, life of a lease in us; then for each key
-- what is done (give: tokens of a bucket back; add: tokens that were used already; leave, renew: a lease), the name of the
-- bucket or lease, the amount. Returns nothing.
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000000 + tonumber(t[2])
local width, buckets, lease_us = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local current = string.format('%.0f', math.floor(now / width))
for i, key in ipairs(KEYS) do
  local what, name, amount = ARGV[3 * i + 1], ARGV[3 * i + 2], tonumber(ARGV[3 * i + 3])
  if what == 'give' then
    local held = tonumber(redis.call('HGET', key, name) or 0)
    if held > amount then
      redis.call('HINCRBY', key, name, -amount)
    else
      redis.call('HDEL', key, name)
    end
  elseif what == 'add' then
    redis.call('HINCRBY', key, current, amount)
    redis.call('PEXPIRE', key, math.ceil((buckets + 2) * width / 1000))
  elseif what == 'leave' then
    redis.call('ZREM', key, name)
  else
    redis.call('ZADD', key, string.format('%.0f', now + lease_us), name)
    redis.call('PEXPIRE', key, math.ceil(lease_us / 1000))
  end
end
