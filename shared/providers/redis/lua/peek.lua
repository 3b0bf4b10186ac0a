#!lua flags=no-writes
-- Show what would be reserved next, of one subscription.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the subscription, 2 how many at most
-- Returns  for each a line and the envelope. The line: seq, subscription, token, attempts
-- @include _queue

local answer = {}
if tonumber(ARGV[2]) <= 0 then return answer end
for _, seq in ipairs(redis.call('ZRANGE', places(1).waiting, 0, ARGV[2] - 1)) do
  local record = record_of(seq)
  local envelope = redis.call('HGET', MESSAGES, seq)
  if record and record.subscription == ARGV[1] and envelope then
    add_lease(answer, seq, record, envelope)
  end
end
return answer
