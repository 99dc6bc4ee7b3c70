-- Takes amounts of several counters in one step, all or none.
--
-- KEYS: a counter each. ARGV: width of a bucket in us, whole buckets per window, life of a lease in us, name of the lease,
-- wait in us that is told where no place is free; then for each key its kind (requests, tokens, concurrent), limit, amount.
-- Returns the current bucket, the number of the key that stands longest in the way (0: all were taken), the wait in us,
-- and for each key how much of it is used and in how many us it would be empty.
--
-- Times are microseconds of the server's own clock, so that replicas agree. Numbers are written with %.0f where they are
-- large, since Lua's own way of writing them has 14 digits.
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000000 + tonumber(t[2])
local width, buckets, place_wait = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
local lease_us, lease = tonumber(ARGV[3]), ARGV[4]
local current = math.floor(now / width)
local short, wait, levels = 0, -1, {}
for i, key in ipairs(KEYS) do
  local kind, limit, amount = ARGV[3 * i + 3], tonumber(ARGV[3 * i + 4]), tonumber(ARGV[3 * i + 5])
  local used, newest, delay = 0, -1, -1
  if kind == 'concurrent' then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now))
    used = redis.call('ZCARD', key)
    if used + amount > limit then delay = place_wait end
  else
    local flat, live = redis.call('HGETALL', key), {}
    for j = 1, #flat, 2 do
      local bucket, held = tonumber(flat[j]), tonumber(flat[j + 1])
      -- A bucket of the future is left from before the server's clock was set back.
      if bucket < current - buckets or bucket > current + buckets then
        redis.call('HDEL', key, flat[j])
      else
        used = used + held
        live[#live + 1] = {bucket, held}
        if bucket > newest then newest = bucket end
      end
    end
    local missing = used + amount - limit
    if missing > 0 then
      table.sort(live, function(a, b) return a[1] < b[1] end)
      for _, each in ipairs(live) do
        missing = missing - each[2]
        delay = (each[1] + buckets + 1) * width - now
        if missing <= 0 then break end
      end
    end
  end
  if delay > wait then short, wait = i, delay end
  levels[2 * i - 1], levels[2 * i] = used, newest
end
if short == 0 then
  local life = math.ceil((buckets + 2) * width / 1000)
  for i, key in ipairs(KEYS) do
    local kind, amount = ARGV[3 * i + 3], tonumber(ARGV[3 * i + 5])
    if kind == 'concurrent' then
      redis.call('ZADD', key, string.format('%.0f', now + lease_us), lease)
      redis.call('PEXPIRE', key, math.ceil(lease_us / 1000))
      levels[2 * i - 1] = levels[2 * i - 1] + 1
    elseif amount > 0 then
      redis.call('HINCRBY', key, string.format('%.0f', current), amount)
      redis.call('PEXPIRE', key, life)
      levels[2 * i - 1], levels[2 * i] = levels[2 * i - 1] + amount, current
    end
  end
end
for i = 1, #KEYS do
  local newest = levels[2 * i]
  levels[2 * i] = newest >= 0 and (newest + buckets + 1) * width - now or 0
end
return {current, short, wait, levels}
