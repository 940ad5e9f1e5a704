"""What the Redis server does in one step each: the scripts of :class:`~paraval.storage.RedisStorage`.

The keys of a storage whose prefix is ``P``:

===================== ========== ===================================================================================
``P``                 hash       ``schema``: the version of all this
``P:searches``        hash       search id -> how many jobs it has
``P:search:S:new``    hash       number of a job -> a run: this job and some after it, as they were inserted
``P:search:S:jobs``   hash       number of a job that has changed -> head, changes
``P:search:S:parts``  hash       ``number.k`` -> changes of a job that has many; the k-th part, the oldest first
``P:search:S:log``    string     for each revision, 6 bytes: the number of the job that changed
``P:search:S:values`` hash       the values of the search
``P:leases``          sorted set owner -> until when it lives (milliseconds since 1970, by the server's clock)
``P:session:X``       string     the last write of connection X, and its answer; it expires
===================== ========== ===================================================================================

A job is stored as what happened to it, one frame after the other (see ``frames``), each change followed by its
revision (6 bytes); whoever reads it applies the changes. So a write sends what has changed and reads little, and the
server need not understand a record. A head in front says what it must know: the number of parts (4 bytes), and the
owner (2 for its length, then a mark and its name; nothing for nobody).

A run has the revision of its first job (6 bytes), how many jobs it has (2), their owner (as above), where the frames of
the first begin and those of each end (4 bytes each; the first need not be 0), and the frames. None goes over a multiple
of 32, so the run of a job is soon found.

Lua keeps each string once. Older servers look for it among those whose last byte, and few others, are the same, so what
is long should end in different ways. A revision does, and so does a check sum.

A write whose answer was lost is sent again. Each connection numbers its writes, and the server remembers the last one
with its answer, in the same step: the second copy is answered, not executed. A call that was given up and is made again
has the same number where it matters.

Each script looks at everything that may be wrong before it changes anything, as Redis does not roll back.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

__all__ = [
    "ADD",
    "CHANGE",
    "GET",
    "GET_VALUE",
    "HEAD",
    "HELLO",
    "NEW_SEARCH",
    "NUMBER_SIZE",
    "OWNERS",
    "PUT_VALUE",
    "RENEW",
    "SCAN",
    "SCHEMA",
    "SEARCHES",
    "Script",
]

SCHEMA: Final = 1
HEAD: Final = struct.Struct(">IH")
"""The head of a job: how many parts, and the length of its owner, who follows."""
NUMBER_SIZE: Final = 6
"""Bytes of a revision, and of a job's number in the log."""


class Script:
    """One script.

    Attributes:
        text: the program.
        sha: what the server calls it.
        writes: it takes a session's name, the number of the write, and how long to remember it (ms), before all else.
        exact: it matters whether it is executed once or twice. Where it does not, what is meant may be the second time:
            a lease runs from then.
    """

    def __init__(self, *pieces: str, writes: bool = False, exact: bool = False) -> None:
        self.writes = writes
        self.exact = exact
        self.text = "\n".join([_START, *([_ONCE] if writes else []), *pieces]).encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


_START = f"""
local call, root = redis.call, KEYS[1]
local schema = call('HGET', root, 'schema')
if schema and schema ~= '{SCHEMA}' then return {{'schema', schema}} end
"""

# A copy that comes after its successor is one that nobody waits for any more.
_ONCE = """
local session, turn = root .. ':session:' .. ARGV[1], ARGV[2]
local last = call('GET', session)
if last then
  local known, answer = string.match(last, '^(%d+) (.*)$')
  if known == turn then return cmsgpack.unpack(answer) end
  if tonumber(known) > tonumber(turn) then return {'late'} end
end
local function done(answer)
  call('SET', session, turn .. ' ' .. cmsgpack.pack(answer), 'PX', ARGV[3])
  return answer
end
"""

# An unpack() of Lua's may give some 8,000 values at once.
_MANY = """
local function many(command, key, items)
  for first = 1, #items, 4000 do
    call(command, key, unpack(items, first, math.min(first + 3999, #items)))
  end
end
"""

# What a search consists of goes together: what is missing, or too short, was not left so by us. A string of Redis has
# at most 512 MB, and so has the log.
_SEARCH = """
local searches, read = root .. ':searches', struct.unpack
local function search(id, is_to_grow)
  local count = call('HGET', searches, id)
  if not count then return {'no search', id, call('HLEN', searches)} end
  local base = root .. ':search:' .. id
  local revision = call('STRLEN', base .. ':log') / 6
  count = tonumber(count)
  local keys = (count > 0 and 1 or 0) + (revision > count and 1 or 0)
  if revision % 1 ~= 0 or revision < count or call('EXISTS', base .. ':new', base .. ':jobs') ~= keys then
    return {'lost', id}
  end
  if is_to_grow and revision > 80000000 then return {'full', id} end
  return nil, base, count, revision
end
"""

# A number as 6 bytes, for many numbers that are near one another: struct.pack takes its time.
_SIX = """
local fronts, backs = {}, {}
local function six(number)
  local last = number % 256
  local rest = number - last
  local front, back = fronts[rest], backs[last]
  if not front then
    front = string.sub(struct.pack('>I6', rest), 1, 5)
    fronts[rest] = front
  end
  if not back then
    back = string.char(last)
    backs[last] = back
  end
  return front .. back
end
"""

# Gives a function that finds the run of a job.
_RUNS = """
local function runs(base)
  local key, known = base .. ':new', {}
  local function fetch(first, number)
    local run = call('HGET', key, first)
    if not run then return nil end
    local revision, size, owner, at = read('>I6I2I2c0', run)
    if first + size > number then
      return {first = first, past = first + size, revision = revision, owner = owner, text = run, at = at}
    end
  end
  return function(number)
    local page = number - number % 32
    local found = known[page]
    if found and found.first <= number and number < found.past then return found end
    found = fetch(page, number)
    for first = number, page + 1, -1 do
      if found then break end
      found = fetch(first, number)
    end
    known[page] = found
    return found
  end
end
"""

# Adds a job to an answer: its number, its revision, how many pieces it has, and those: as it was inserted, the parts,
# and the changes after those. Gives the new length of the answer; nil if something is missing.
_TELL = """
local function tell(answer, size, base, run, number, revision, value)
  if not run.ends then
    run.ends = {read('>' .. string.rep('I4', run.past - run.first + 1), run.text, run.at)}
    run.offset = run.ends[#run.ends] - run.ends[1]
  end
  local k, parts = number - run.first, value and read('>I4', value) or 0
  answer[size + 1], answer[size + 2], answer[size + 3] = number, revision, value and parts + 2 or 1
  answer[size + 4] = string.sub(run.text, run.offset + run.ends[k + 1], run.offset + run.ends[k + 2] - 1)
  for part = 1, parts do
    local found = call('HGET', base .. ':parts', number .. '.' .. part - 1)
    if not found then return nil end
    answer[size + 4 + part] = found
  end
  answer[size + 5 + parts] = value or nil
  return size + 4 + parts + (value and 1 or 0)
end
"""

HELLO = Script("return {'ok'}")

SEARCHES = Script("return {'ok', call('HLEN', root .. ':searches')}")

# schema
NEW_SEARCH = Script(
    """
local searches = root .. ':searches'
local id = call('HLEN', searches)
local base = root .. ':search:' .. id
if call('EXISTS', base .. ':new', base .. ':jobs', base .. ':log', base .. ':parts', base .. ':values') > 0 then
  return {'lost', tostring(id)}
end
call('HSETNX', root, 'schema', ARGV[4])
call('HSET', searches, id, 0)
return done({'ok', id})
""",
    writes=True,
    exact=True,
)

# search; then for those jobs of each owner: the owner, where the frames begin and end, the frames
# -> first number, first revision
ADD = Script(
    _MANY,
    _SEARCH,
    _SIX,
    """
local failure, base, count, revision = search(ARGV[4], true)
if failure then return failure end
local answer, new, log = {'ok', count, revision + 1}, {}, {}
local sub, pack = string.sub, struct.pack
for a = 5, #ARGV, 3 do
  local owner, ends, frames = ARGV[a], ARGV[a + 1], ARGV[a + 2]
  local size, i = #ends / 4 - 1, 0
  while i < size do
    local j = math.min(size, i + 32 - count % 32)
    local from, to = read('>I4', ends, 4 * i + 1), read('>I4', ends, 4 * j + 1)
    while to - from > 65536 and j > i + 1 do
      j = math.floor((i + j) / 2)
      to = read('>I4', ends, 4 * j + 1)
    end
    new[#new + 1] = count
    new[#new + 1] = pack('>I6I2I2', revision + 1, j - i, #owner)
      .. owner .. sub(ends, 4 * i + 1, 4 * j + 4) .. sub(frames, from + 1, to)
    for number = count, count + j - i - 1 do log[#log + 1] = six(number) end
    count, revision, i = count + j - i, revision + j - i, j
  end
end
if #log > 0 then
  many('HSET', base .. ':new', new)
  call('APPEND', base .. ':log', table.concat(log))
  call('HSET', searches, ARGV[4], count)
end
return done(answer)
""",
    writes=True,
    exact=True,
)

# new owner ('': the same as before), then for each search: its id, numbers, the same (6 bytes each), conditions,
# lengths of the frames, frames. A condition is '' (none), the owner (a string) or the revision (a number). One
# condition, one frame may be for all.
CHANGE = Script(
    _MANY,
    _SEARCH,
    _RUNS,
    """
local heir, todo, ids = ARGV[4], {}, {}
local sub, pack = string.sub, struct.pack
local function head(parts, owner) return pack('>I4I2', parts, #owner) .. owner end
for a = 5, #ARGV, 6 do
  local id, numbers, log = ARGV[a], cmsgpack.unpack(ARGV[a + 1]), ARGV[a + 2]
  local conditions, lengths, frames = cmsgpack.unpack(ARGV[a + 3]), cmsgpack.unpack(ARGV[a + 4]), ARGV[a + 5]
  local failure, base, count, revision = search(id, true)
  if failure then return failure end
  local run_of, run = runs(base)
  local new, place, sealed, unmet = {}, {}, {}, {}
  local condition, frame, from, size = conditions[1], frames, 1, 0
  local owner = type(condition) == 'string' and sub(head(0, condition), 5)
  local front, backs = nil, {}
  for first = 1, #numbers, 4000 do
    local values = call('HMGET', base .. ':jobs', unpack(numbers, first, math.min(first + 3999, #numbers)))
    for k = 1, #values do
      local i = first + k - 1
      local name, value, number = numbers[i], values[k], nil
      local at = place[name]
      if at then value = new[at] end
      if not value then
        number = tonumber(name)
        if number >= count then return {'no job', id .. '.' .. name} end
        if not run or number < run.first or number >= run.past then run = run_of(number) end
        if not run then return {'lost', id} end
      end
      if conditions[2] then
        condition = conditions[i]
        owner = type(condition) == 'string' and sub(head(0, condition), 5)
      end
      if lengths[2] then
        frame = sub(frames, from, from + lengths[i] - 1)
        from = from + lengths[i]
      end
      local is_met = condition == ''
      if not owner then
        is_met = condition == (value and read('>I6', value, #value - 5) or run.revision + number - run.first)
      elseif not is_met and value then
        is_met = sub(value, 5, 4 + #owner) == owner
      elseif not is_met then
        is_met = run.owner == condition
      end
      if not is_met then
        unmet[#unmet + 1] = i
      else
        revision = revision + 1
        if not at then
          at, size = size + 2, size + 2
          new[at - 1], place[name] = name, at
        end
        if not value then
          if not run.head then run.head = head(0, run.owner) end
          value = run.head
        end
        if heir ~= '' or #value > 16384 then
          local parts, owner, start = read('>I4I2c0', value)
          local body = sub(value, start)
          if #body > 16384 then
            if #sealed == 0 then call('HLEN', base .. ':parts') end
            sealed[#sealed + 1] = name .. '.' .. parts
            sealed[#sealed + 1] = body
            body, parts = '', parts + 1
          end
          if heir ~= '' then
            owner = heir
            ids[#ids + 1] = id .. '.' .. name
          end
          value = head(parts, owner) .. body
        end
        local last = revision % 256
        if last == 0 or not front then front = sub(pack('>I6', revision), 1, 5) end
        local back = backs[last]
        if not back then
          back = string.char(last)
          backs[last] = back
        end
        new[at] = value .. frame .. front .. back
      end
    end
  end
  local logs, after = {}, 0
  for _, i in ipairs(unmet) do
    logs[#logs + 1] = sub(log, 6 * after + 1, 6 * i - 6)
    after = i
  end
  log = table.concat(logs) .. sub(log, 6 * after + 1)
  if log ~= '' then todo[#todo + 1] = {base, new, log, sealed} end
end
for _, it in ipairs(todo) do
  many('HSET', it[1] .. ':jobs', it[2])
  call('APPEND', it[1] .. ':log', it[3])
  many('HSET', it[1] .. ':parts', it[4])
end
return done({'ok', ids})
""",
    writes=True,
    exact=True,
)

# search, numbers -> the jobs
GET = Script(
    _SEARCH,
    _RUNS,
    _TELL,
    """
local failure, base, count = search(ARGV[1])
if failure then return failure end
local numbers, run_of, answer, size = cmsgpack.unpack(ARGV[2]), runs(base), {}, 0
local values = call('HMGET', base .. ':jobs', unpack(numbers))
for i, name in ipairs(numbers) do
  local number, value = tonumber(name), values[i]
  if number >= count then return {'no job', ARGV[1] .. '.' .. name} end
  local run = run_of(number)
  local revision = value and read('>I6', value, #value - 5) or run and run.revision + number - run.first
  size = run and tell(answer, size, base, run, number, revision, value)
  if not size then return {'lost', ARGV[1]} end
end
return {'ok', answer}
""",
)

# search, since, how many changes to look at -> how far this goes, whether that is the end, the jobs
# A job that has changed again beyond what was looked at is left out: it comes later.
SCAN = Script(
    _SEARCH,
    _RUNS,
    _TELL,
    """
local failure, base, count, revision = search(ARGV[1])
if failure then return failure end
local since = tonumber(ARGV[2])
local to = math.min(revision, since + tonumber(ARGV[3]))
if since >= revision then return {'ok', revision, 1, {}} end
local log = {read('>' .. string.rep('I6', to - since), call('GETRANGE', base .. ':log', since * 6, to * 6 - 1))}
local numbers, last, run_of, run, answer, size = {}, {}, runs(base), nil, {}, 0
for i = to - since, 1, -1 do
  local number = log[i]
  if not last[number] then
    last[number] = since + i
    numbers[#numbers + 1] = number
  end
end
local values = call('HMGET', base .. ':jobs', unpack(numbers))
for i, number in ipairs(numbers) do
  local value = values[i]
  if not run or number < run.first or number >= run.past then run = run_of(number) end
  local changed = value and read('>I6', value, #value - 5) or run and run.revision + number - run.first
  if not run or changed < last[number] or changed > revision then return {'lost', ARGV[1]} end
  if changed <= to then
    size = tell(answer, size, base, run, number, changed, value)
    if not size then return {'lost', ARGV[1]} end
  end
end
return {'ok', to, to == revision and 1 or 0, answer}
""",
)

PUT_VALUE = Script(
    _SEARCH,
    """
local failure = search(ARGV[4])
if failure then return failure end
call('HSET', root .. ':search:' .. ARGV[4] .. ':values', ARGV[5], ARGV[6])
return done({'ok'})
""",
    writes=True,
)

GET_VALUE = Script(
    _SEARCH,
    """
local failure = search(ARGV[1])
if failure then return failure end
return {'ok', call('HGET', root .. ':search:' .. ARGV[1] .. ':values', ARGV[2])}
""",
)

# An end that nobody lives to see stands for infinity.
_NOW = """
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leases = root .. ':leases'
"""

RENEW = Script(
    _NOW,
    """
call('ZREMRANGEBYSCORE', leases, '-inf', now)
local span = tonumber(ARGV[5])
if span > 0 then
  call('ZADD', leases, now + span, ARGV[4])
else
  call('ZREM', leases, ARGV[4])
end
return done({'ok'})
""",
    writes=True,
)

OWNERS = Script(
    _NOW,
    """
return {'ok', call('ZRANGEBYSCORE', leases, '(' .. string.format('%.0f', now), '+inf')}
""",
)
