"""What the Redis server does in one step each: the scripts of :class:`~paraval.storage.RedisStorage`.

The keys of a storage whose prefix is ``P``:

========================= ========== ===============================================================================
``P``                     hash       ``schema``: the version of all this
``P:searches``            hash       search id -> when it was made (seconds since 1970, by the server's clock)
``P:search:S:jobs``       hash       job number -> head and changes of the job
``P:search:S:parts``      hash       ``number.k`` -> changes of a job whose record has become long, oldest part first
``P:search:S:log``        list       at position r - 1: the number of the job that changed at revision r
``P:search:S:values``     hash       the values of the search
``P:leases``              sorted set owner -> until when it lives (milliseconds since 1970, by the server's clock)
``P:session:X``           string     the last write of connection X and its answer; it expires
========================= ========== ===============================================================================

A job is stored as what happened to it, one frame after the other (see ``redis_frames``), each followed by its revision
(6 bytes); whoever reads it applies the changes. So a write sends what has changed and reads nothing, and the server
need not understand a record. A head in front says what it must know: the number of parts that were written before (4
bytes), and the owner (2 for its length, then a mark and its name; nothing for nobody).

Lua keeps each string once. Older servers look for it among those whose last byte, and few others, are the same, so what
is long should end in different ways. A revision does, and so does a check sum.

A write whose answer was lost is sent again. Each connection numbers its writes, and the server remembers the last one
with its answer, in the same step: the second copy is answered, not executed.

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
    "OWNERS",
    "PUT_VALUE",
    "RENEW",
    "REVISION_SIZE",
    "SCAN",
    "SCHEMA",
    "SEARCHES",
    "Script",
]

SCHEMA: Final = 1
HEAD: Final = struct.Struct(">IH")
"""The head of a job: how many parts, and the length of its owner, who follows."""
REVISION_SIZE: Final = 6


class Script:
    """One script.

    Attributes:
        text: the program.
        sha: what the server calls it.
        writes: it takes a session's name, the number of the write, and how long to remember it (ms), before all else.
    """

    def __init__(self, *pieces: str, writes: bool = False) -> None:
        self.writes = writes
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

# What a search consists of goes together: a hash without its log was not left so by us.
_SEARCH = """
local function search(id)
  local searches = root .. ':searches'
  if call('HEXISTS', searches, id) == 0 then return {'no search', id, call('HLEN', searches)} end
  local base = root .. ':search:' .. id
  local jobs, log, parts = base .. ':jobs', base .. ':log', base .. ':parts'
  local count, revision = call('HLEN', jobs), call('LLEN', log)
  if count > revision or (count == 0 and revision > 0) then return {'lost', id} end
  return nil, jobs, log, parts, count, revision
end
"""

# One read of a job: its value, or a table of it and its parts.
_WHOLE = """
local function whole(parts, number, value)
  local count = struct.unpack('>I4', value)
  if count == 0 then return value end
  local all = {value}
  for k = 0, count - 1 do
    local part = call('HGET', parts, number .. '.' .. k)
    if not part then return nil end
    all[k + 2] = part
  end
  return all
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
if call('EXISTS', base .. ':jobs', base .. ':log', base .. ':parts', base .. ':values') > 0 then
  return {'lost', tostring(id)}
end
call('HSETNX', root, 'schema', ARGV[4])
call('HSET', searches, id, call('TIME')[1])
return done({'ok', id})
""",
    writes=True,
)

# search, lengths of the jobs (a head and a frame each), the jobs -> first number, first revision
ADD = Script(
    _MANY,
    _SEARCH,
    """
local failure, jobs, log, parts, number, revision = search(ARGV[4])
if failure then return failure end
local lengths, frames = cmsgpack.unpack(ARGV[5]), ARGV[6]
local answer = {'ok', number, revision + 1}
local new, changed, from = {}, {}, 1
local sub, pack = string.sub, struct.pack
for i = 1, #lengths do
  revision = revision + 1
  local to = from + lengths[i]
  new[2 * i - 1], new[2 * i] = number, sub(frames, from, to - 1) .. pack('>I6', revision)
  changed[i] = number
  number, from = number + 1, to
end
many('HSET', jobs, new)
many('RPUSH', log, changed)
return done(answer)
""",
    writes=True,
)

# new owner ('': the same as before), then for each search: its id, numbers, conditions, lengths of the frames, frames.
# A condition is '' (none), the owner (a string) or the revision (a number). One condition, one frame may be for all.
CHANGE = Script(
    _MANY,
    _SEARCH,
    """
local heir, todo, ids = ARGV[4], {}, {}
local sub, pack, read = string.sub, struct.pack, struct.unpack
for a = 5, #ARGV, 5 do
  local id = ARGV[a]
  local failure, jobs, log, parts, _, revision = search(id)
  if failure then return failure end
  local numbers, conditions = cmsgpack.unpack(ARGV[a + 1]), cmsgpack.unpack(ARGV[a + 2])
  local lengths, frames = cmsgpack.unpack(ARGV[a + 3]), ARGV[a + 4]
  local new, place, changed, sealed, from = {}, {}, {}, {}, 1
  for first = 1, #numbers, 4000 do
    local values = call('HMGET', jobs, unpack(numbers, first, math.min(first + 3999, #numbers)))
    for k = 1, #values do
      local i = first + k - 1
      local number = numbers[i]
      local at = place[number]
      local value = at and new[at] or values[k]
      if not value then return {'no job', id .. '.' .. number} end
      local frame = frames
      if lengths[2] then
        frame = sub(frames, from, from + lengths[i] - 1)
        from = from + lengths[i]
      end
      local condition = conditions[i] or conditions[1]
      local count, owner, start = read('>I4I2c0', value)
      if condition == '' or condition == owner or condition == read('>I6', value, #value - 5) then
        revision = revision + 1
        changed[#changed + 1] = number
        if not at then
          at = #new + 2
          new[at - 1], place[number] = number, at
        end
        if heir == '' and #value < 16384 then
          new[at] = value .. frame .. pack('>I6', revision)
        else
          local body = sub(value, start)
          if #value >= 16384 then
            if #sealed == 0 then call('HLEN', parts) end
            sealed[#sealed + 1] = number .. '.' .. count
            sealed[#sealed + 1] = body
            body, count = '', count + 1
          end
          if heir ~= '' then
            owner = heir
            ids[#ids + 1] = id .. '.' .. number
          end
          new[at] = pack('>I4I2', count, #owner) .. owner .. body .. frame .. pack('>I6', revision)
        end
      end
    end
  end
  todo[#todo + 1] = {jobs, new, log, changed, parts, sealed}
end
for _, it in ipairs(todo) do
  many('HSET', it[1], it[2])
  many('RPUSH', it[3], it[4])
  many('HSET', it[5], it[6])
end
return done({'ok', ids})
""",
    writes=True,
)

# search, numbers -> the jobs
GET = Script(
    _SEARCH,
    _WHOLE,
    """
local failure, jobs, log, parts = search(ARGV[1])
if failure then return failure end
local numbers = cmsgpack.unpack(ARGV[2])
local found = call('HMGET', jobs, unpack(numbers))
for i, number in ipairs(numbers) do
  if not found[i] then return {'no job', ARGV[1] .. '.' .. number} end
  found[i] = whole(parts, number, found[i])
  if not found[i] then return {'lost', ARGV[1]} end
end
return {'ok', found}
""",
)

# search, since, how many changes to look at -> how far this goes, whether that is the end, number and job in turn.
# A job that has changed again beyond what was looked at is left out: it comes later.
SCAN = Script(
    _SEARCH,
    _WHOLE,
    """
local failure, jobs, log, parts, _, revision = search(ARGV[1])
if failure then return failure end
local since = tonumber(ARGV[2])
local to = math.min(revision, since + tonumber(ARGV[3]))
if since >= revision then return {'ok', revision, 1, {}} end
local numbers, seen = {}, {}
for _, number in ipairs(call('LRANGE', log, since, to - 1)) do
  if not seen[number] then
    seen[number] = true
    numbers[#numbers + 1] = number
  end
end
local values, found = call('HMGET', jobs, unpack(numbers)), {}
for i, number in ipairs(numbers) do
  if not values[i] then return {'lost', ARGV[1]} end
  if struct.unpack('>I6', values[i], #values[i] - 5) <= to then
    local value = whole(parts, number, values[i])
    if not value then return {'lost', ARGV[1]} end
    found[#found + 1] = number
    found[#found + 1] = value
  end
end
return {'ok', to, to == revision and 1 or 0, found}
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
