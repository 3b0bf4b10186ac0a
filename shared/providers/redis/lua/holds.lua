#!lua flags=no-writes
-- Tell which deliveries of one subscription are here, so that somebody will handle them or see them.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the subscription, then seqs
-- Returns  for each 1, or 0 where there is no record, no envelope, or none of the places has it
-- @include _queue

local answer, seqs = {}, { unpack(ARGV, 2) }
load_records(seqs)
for i, seq in ipairs(seqs) do
  local record = record_of(seq)
  local is_here = record and record.subscription == ARGV[1] and is_whole(places(1), seq)
  answer[i] = is_here and 1 or 0
end
return answer
