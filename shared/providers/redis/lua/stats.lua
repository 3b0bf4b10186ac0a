#!lua flags=no-writes
-- Count what each subscription has.
--
-- KEYS  as in _queue.lua
-- ARGV  none
-- Returns  for each subscription of KEYS: waiting, leased, scheduled, dead
-- @include _queue

local answer = {}
for n = 1, count_of_subscriptions() do
  local place = places(n)
  for _, key in ipairs({ place.waiting, place.leases, place.scheduled, place.dead }) do
    answer[#answer + 1] = redis.call('ZCARD', key)
  end
end
return answer
