#!lua flags=allow-oom
-- Remove what one subscription has in some of its places; call it again until it removes 0.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the subscription, then the places
-- Returns  how many were removed, at most 1000 of each place
-- @include _queue

local removed = 0
for i = 2, #ARGV do
  local popped = redis.call('ZPOPMIN', places(1)[ARGV[i]], BATCH)
  for j = 1, #popped, 2 do
    local record = record_of(popped[j])
    if record and record.subscription == ARGV[1] then
      remove(popped[j])
    end
    removed = removed + 1
  end
end
write_all()
return removed
