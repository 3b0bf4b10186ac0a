#!lua flags=allow-oom
-- End leases, each in its own way.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the channel, 2 for how many ms what was settled is remembered, 3 how many at most;
--       then for each a line: its place among the subscriptions of KEYS, seq, token, what to
--       do, delay in ms
-- Returns  for each 0, or LEASE_LOST when somebody else has it, or nobody
-- @include _queue

local now = milliseconds()
local woken, answer, has_settled = {}, {}, false

local act = {}

function act.acknowledge(_, seq, record)
  remove(seq)
  write('ZADD', SETTLED, now, seq .. ':' .. record.id)
  has_settled = true
end

function act.retry(place, seq, record, delay)
  record.attempts = record.attempts + 1
  if delay <= 0 then return act.release(place, seq, record) end
  save(seq, record)
  if schedule(place, seq, now + delay) then woken[record.subscription] = true end
end

function act.release(place, seq, record)
  save(seq, record)
  let_wait(place, seq, record)
  woken[record.subscription] = true
end

function act.dead_letter(place, seq, record)
  record.attempts = record.attempts + 1
  save(seq, record)
  write('ZADD', place.dead, now, seq)
end

-- Without its envelope nobody can handle it: as if it had never been here.
function act.forget(_, seq)
  remove(seq)
end

local function forget_settled()
  redis.call('ZREMRANGEBYSCORE', SETTLED, '-inf', now - ARGV[2])
  redis.call('ZREMRANGEBYRANK', SETTLED, 0, -1 - ARGV[3])
  redis.call('PEXPIRE', SETTLED, ARGV[2])
end

for i = 4, #ARGV do
  local n, seq, token, action, delay = words(ARGV[i], 5)
  local record = record_of(seq)
  if record and record.token == tonumber(token) then
    local place = places(tonumber(n))
    write('ZREM', place.leases, seq)
    record.token = record.token + 1
    act[action](place, seq, record, tonumber(delay))
    answer[#answer + 1] = 0
  else
    answer[#answer + 1] = LEASE_LOST
  end
end
write_all()
if has_settled then forget_settled() end
wake(ARGV[1], woken)
return answer
