#!lua
-- Queue deliveries. One that is here already is left as it is, but for a dead letter, which
-- comes back, and for one with an older token or one that is not whole, whose place it takes; and so
-- is one that was settled just now, unless its token says that the log knows of its earlier leases,
-- and will see by itself what is to be done.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the channel; then for each delivery a line and the envelope. The line: its place
--       among the subscriptions of KEYS, subscription, seq, token, attempts, rank, delay in ms,
--       message id
-- Returns  how many were queued
-- @include _queue

local now = milliseconds()
local queued, woken = 0, {}

-- A seq of another message, of a log that was thrown away or restored from a backup; or a copy that
-- the log has moved on from.
local function forget(place, seq)
  for _, key in pairs(place) do redis.call('ZREM', key, seq) end
end

-- Return the record to queue it by, or nothing.
local function record_for(place, seq, given)
  local record = record_of(seq)
  if not record then
    local is_double = given.token == 0
      and redis.call('ZSCORE', SETTLED, seq .. ':' .. given.id)
    return not is_double and given
  end
  if record.id ~= given.id or record.subscription ~= given.subscription then
    forget(place, seq)
    record.token = record.token + 1
  elseif given.token > record.token then
    -- the log refuses whoever has this copy, and has it dropped: that must not take the new one
    forget(place, seq)
  elseif not is_whole(place, seq) then
    forget(place, seq)
    record.token = record.token + 1
  elseif redis.call('ZREM', place.dead, seq) == 0 then
    return nil
  end
  given.token = math.max(given.token, record.token)
  return given
end

for i = 2, #ARGV, 2 do
  local n, subscription, seq, token, attempts, rank, delay, id = words(ARGV[i], 8)
  local place = places(tonumber(n))
  local record = record_for(place, seq, {
    token = tonumber(token), attempts = tonumber(attempts),
    subscription = subscription, rank = tonumber(rank), id = id })
  if record then
    queued = queued + 1
    write('HSET', MESSAGES, seq, ARGV[i + 1])
    save(seq, record)
    if tonumber(delay) <= 0 then
      let_wait(place, seq, record)
      woken[subscription] = true
    elseif schedule(place, seq, now + delay) then
      woken[subscription] = true
    end
  end
end
write_all()
wake(ARGV[1], woken)
return queued
