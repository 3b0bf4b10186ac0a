#!lua flags=allow-oom
-- Lease what waits, by fair shares; before that, have what is due wait, and take over leases
-- that ran out.
--
-- KEYS  as in _queue.lua
-- ARGV  1 the lease in ms, 2 the most altogether, 3 whose turn it is to be first;
--       then for each subscription of KEYS: its id, and the most for it
-- Returns  {ms until something is due of itself or -1,
--           then for each lease a line and the envelope.
--           The line: seq, subscription, token, attempts}
-- @include _queue

local now = milliseconds()

-- Have wait again what has a score up to now; the token of what was leased moves on at once,
-- so that who held it can no longer settle.
local function let_wait_due(key, place, subscription, moves_on)
  local seqs = redis.call('ZRANGE', key, '-inf', now, 'BYSCORE', 'LIMIT', 0, BATCH)
  if #seqs == 0 then return end
  load_records(seqs)
  local due = {}
  for _, seq in ipairs(seqs) do
    local record = record_of(seq)
    if record and record.subscription == subscription then
      record.token = record.token + moves_on
      if moves_on > 0 then save(seq, record) end
      due[#due + 1] = score(record, seq)
      due[#due + 1] = seq
    end
  end
  -- at once, since they are counted next
  if #due > 0 then redis.call('ZADD', place.waiting, unpack(due)) end
  redis.call('ZREM', key, unpack(seqs))
end

local function hungry_subscriptions()
  local found = {}
  for n = 1, count_of_subscriptions() do
    local subscription, most = ARGV[2 + 2 * n], tonumber(ARGV[3 + 2 * n])
    local place = places(n)
    let_wait_due(place.scheduled, place, subscription, 0)
    let_wait_due(place.leases, place, subscription, 1)
    if most > 0 and redis.call('SISMEMBER', PAUSED, subscription) == 0 then
      local can = math.min(redis.call('ZCARD', place.waiting), most)
      if can > 0 then
        found[#found + 1] = { id = subscription, place = place, can = can, gets = 0 }
      end
    end
  end
  return found
end

-- Begin with another one each time: who is first may get all there is room for.
local function in_turn(list, turn)
  local turned = {}
  for i = 1, #list do turned[i] = list[(turn + i - 1) % #list + 1] end
  return turned
end

local function share_out(hungry, left)
  while left > 0 and #hungry > 0 do
    local share, rest = math.floor(left / #hungry), left % #hungry
    local still = {}
    for i, each in ipairs(hungry) do
      local more = math.min(share + (i <= rest and 1 or 0), each.can - each.gets)
      each.gets = each.gets + more
      left = left - more
      if each.gets < each.can then still[#still + 1] = each end
    end
    hungry = still
  end
end

local answer = { -1 }

local function lease(each, until_when)
  local popped, seqs = redis.call('ZPOPMIN', each.place.waiting, each.gets), {}
  for i = 1, #popped, 2 do seqs[#seqs + 1] = popped[i] end
  load_records(seqs)
  local envelopes = redis.call('HMGET', MESSAGES, unpack(seqs))
  for i, seq in ipairs(seqs) do
    local record = record_of(seq)
    if record and record.subscription == each.id then
      record.token = record.token + 1
      save(seq, record)
      write('ZADD', each.place.leases, until_when, seq)
      add_lease(answer, seq, record, envelopes[i])
    end
  end
end

local function next_due()
  local first
  for n = 1, count_of_subscriptions() do
    local place = places(n)
    for _, key in ipairs({ place.scheduled, place.leases }) do
      local due = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]
      if due then first = math.min(first or tonumber(due), tonumber(due)) end
    end
  end
  return first and math.max(first - now, 0) or -1
end

local hungry = in_turn(hungry_subscriptions(), tonumber(ARGV[3]))
share_out(hungry, tonumber(ARGV[2]))
local until_when = string.format('%.0f', now + ARGV[1])
for _, each in ipairs(hungry) do
  if each.gets > 0 then lease(each, until_when) end
end
write_all()
answer[1] = next_due()
return answer
