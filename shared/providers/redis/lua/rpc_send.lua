#!lua
-- Send requests or replies to one queue, and wake who takes from it.
--
-- KEYS  1 declared (there once somebody declared the queue), 2 the queue: a list of messages,
--       each "deadline body", the deadline in ms
-- ARGV  1 the channel, 2 what to say there, 3 whether to refuse them unless the queue was
--       declared: 1 or 0; then for each message its ttl in ms, and its body
-- Returns  NOT_DECLARED when they were refused, else 0
-- @include _clock

local NOT_DECLARED = -2

local DECLARED, QUEUE = KEYS[1], KEYS[2]
if ARGV[3] == '1' and redis.call('EXISTS', DECLARED) == 0 then return NOT_DECLARED end

local now, longest = milliseconds(), 0

-- Where nobody takes, the list must not grow with what nobody waits for any more.
local function drop_expired(most)
  for _ = 1, most do
    local first = redis.call('LINDEX', QUEUE, 0)
    if not first or tonumber(string.match(first, '^%d+')) > now then return end
    redis.call('LPOP', QUEUE)
  end
end

drop_expired(#ARGV)
for i = 4, #ARGV, 2 do
  local ttl = tonumber(ARGV[i])
  redis.call('RPUSH', QUEUE, string.format('%.0f', now + ttl) .. ' ' .. ARGV[i + 1])
  longest = math.max(longest, ttl)
end
if redis.call('PTTL', QUEUE) < longest then redis.call('PEXPIRE', QUEUE, longest) end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 0
