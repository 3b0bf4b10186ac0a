#!lua flags=allow-oom
-- Renew leases for another full term from now.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the lease in ms; then for each a line: its place among the subscriptions of KEYS,
--       seq, token
-- Returns  for each 0, or LEASE_LOST when somebody else has it, or nobody
-- @include _queue

local until_when = string.format('%.0f', milliseconds() + ARGV[1])
local answer = {}
for i = 2, #ARGV do
  local n, seq, token = words(ARGV[i], 3)
  local record = record_of(seq)
  if record and record.token == tonumber(token) then
    write('ZADD', places(tonumber(n)).leases, until_when, seq)
    answer[#answer + 1] = 0
  else
    answer[#answer + 1] = LEASE_LOST
  end
end
write_all()
return answer
