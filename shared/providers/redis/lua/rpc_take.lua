#!lua flags=allow-oom
-- Take what is in one queue and not yet over, oldest first.
--
-- KEYS  as in rpc_send.lua
-- ARGV  1 how many at most, 2 whether the queue is a lasting one: 1 or 0
-- Returns  for each its ttl in ms, and its body
-- @include _clock

local DECLARED, QUEUE = KEYS[1], KEYS[2]
-- somebody may have emptied Redis
if ARGV[2] == '1' and redis.call('EXISTS', DECLARED) == 0 then redis.call('SET', DECLARED, '1') end

local now, answer = milliseconds(), {}
while #answer < 2 * ARGV[1] do
  local message = redis.call('LPOP', QUEUE)
  if not message then break end
  local deadline, body = string.match(message, '^(%d+) (.*)$')
  if tonumber(deadline) > now then
    answer[#answer + 1] = tonumber(deadline) - now
    answer[#answer + 1] = body
  end
end
return answer
