-- What all scripts of a queue share: its keys, its records, and moving between its places.
--
-- KEYS  1 messages    (hash: seq -> envelope)
--       2 deliveries  (hash: seq -> record)
--       3 settled     (sorted set: seq:message-id, scored by time; for a minute, to know doubles)
--       4 paused      (set of subscriptions)
--       then four sorted sets of seqs for each subscription that the script is about:
--       waiting   scored by priority, then order      scheduled  scored by the time it is due
--       leases    scored by the time they run out     dead       scored by the time it died
--
-- A record is "token attempts subscription rank message-id". The token moves on whenever a
-- lease begins, ends or is taken over: who has the newest token holds the lease.
-- Times are milliseconds of Redis' own clock.

-- What scripts return for a lease that somebody else has; shared.providers.redis.wire has the same.
local LEASE_LOST = -1

-- At most so many become due, or are taken over, in one go: nobody else is served meanwhile.
local BATCH = 1000

local MESSAGES, DELIVERIES, SETTLED, PAUSED = unpack(KEYS, 1, 4)
local SHARED_KEYS = 4

local function places(n)
  local first = SHARED_KEYS + 4 * (n - 1)
  return { waiting = KEYS[first + 1], scheduled = KEYS[first + 2],
           leases = KEYS[first + 3], dead = KEYS[first + 4] }
end

local function count_of_subscriptions()
  return (#KEYS - SHARED_KEYS) / 4
end

-- Part a line of words: few long arguments are packed and read much faster than many.
local function words(line, count)
  return string.match(line, '^' .. string.rep('(%S+) ', count - 1) .. '(%S+)$')
end

-- Writes are gathered, and done by write_all at a script's end: one command for many values
-- takes less time than as many commands, here and in the append-only file.
local writes, places_of_writes = {}, {}

local function write(command, key, ...)
  local name = command .. key
  local gathered = places_of_writes[name]
  if not gathered then
    gathered = { command = command, key = key, values = {} }
    places_of_writes[name] = gathered
    writes[#writes + 1] = gathered
  end
  for _, value in ipairs({ ... }) do gathered.values[#gathered.values + 1] = value end
end

local function write_all()
  for _, each in ipairs(writes) do
    -- an even number: the values of some commands are pairs
    for i = 1, #each.values, 2 * BATCH do
      local last = math.min(i + 2 * BATCH - 1, #each.values)
      redis.call(each.command, each.key, unpack(each.values, i, last))
    end
  end
end

-- @include _clock

local function parse(text)
  if not text then return nil end
  local token, attempts, subscription, rank, id =
    string.match(text, '^(%d+) (%d+) (%d+) (%d+) (.*)$')
  return { token = tonumber(token), attempts = tonumber(attempts),
           subscription = subscription, rank = tonumber(rank), id = id }
end

local function text_of(record)
  return string.format('%.0f %.0f %s %.0f %s', record.token, record.attempts,
                       record.subscription, record.rank, record.id)
end

-- What a lease is told by: a line, and the envelope; false where that is gone.
local function add_lease(answer, seq, record, envelope)
  answer[#answer + 1] = string.format('%s %s %.0f %.0f', seq, record.subscription,
                                      record.token, record.attempts)
  answer[#answer + 1] = envelope
end

local records = {}

-- Return the record of a delivery, as this script has written it, too; nil if there is none.
local function record_of(seq)
  if records[seq] == nil then
    records[seq] = parse(redis.call('HGET', DELIVERIES, seq)) or false
  end
  return records[seq] or nil
end

-- Read many records at once, for record_of.
local function load_records(seqs)
  local found = redis.call('HMGET', DELIVERIES, unpack(seqs))
  for i, seq in ipairs(seqs) do
    if records[seq] == nil then records[seq] = parse(found[i]) or false end
  end
end

-- Whether a delivery with a record has its envelope, and is in one of its places. What lacks
-- either, nobody would ever handle: Redis was restored from an old copy, or somebody removed it.
local function is_whole(place, seq)
  if redis.call('HEXISTS', MESSAGES, seq) == 0 then return false end
  for _, key in pairs(place) do
    if redis.call('ZSCORE', key, seq) then return true end
  end
  return false
end

local function save(seq, record)
  records[seq] = record
  write('HSET', DELIVERIES, seq, text_of(record))
end

local function remove(seq)
  records[seq] = false
  write('HDEL', DELIVERIES, seq)
  write('HDEL', MESSAGES, seq)
end

-- 2^51 seqs to a rank: four ranks of them are exact as a score.
local function score(record, seq)
  return string.format('%.0f', record.rank * 2251799813685248 + tonumber(seq))
end

local function let_wait(place, seq, record)
  write('ZADD', place.waiting, score(record, seq), seq)
end

-- Written at once, to say whether it is now the first to become due, so that who waits must
-- hear of it.
local function schedule(place, seq, due)
  redis.call('ZADD', place.scheduled, string.format('%.0f', due), seq)
  return redis.call('ZRANGE', place.scheduled, 0, 0)[1] == seq
end

-- Wake who waits for any of these subscriptions.
local function wake(channel, subscriptions)
  local ids = {}
  for id in pairs(subscriptions) do ids[#ids + 1] = id end
  if #ids > 0 then redis.call('PUBLISH', channel, table.concat(ids, ' ')) end
end
