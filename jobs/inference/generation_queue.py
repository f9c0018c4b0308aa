"""The queue of generation requests, in Redis: first come, first served for each user, and users take turns.

The reader of a response (a web process) adds its request here and renews it; an inference worker takes the next one. Each
step is a single script, so that any number of web processes and workers can share the queue. Requests that are not renewed
expire.

    generation:people           the users with waiting requests, next in turn first
    generation:waiting:<owner>  their requests, by time of arrival
    generation:request:<rid>    the request itself
    generation:running[:<owner>]  the requests that a worker holds, by the time when its hold expires
    generation:seconds          how long a request takes, as a moving average
    reading:<rid>               exists as long as the request has a reader
    tokens:<rid>                the response so far: a stream whose entries are numbered 1-0, 2-0, …
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jobs.store import redis_client

MAX_WAITING_OF_ONE = 64
MAX_WAITING = 512
MAX_BYTES_OF_ONE = 32 * 2**20  # the total size of waiting requests, because a long prompt has a few megabytes
MAX_BYTES = 128 * 2**20
RENEWAL_TIMEOUT_S = 15  # without a renewal by the reader for this long, its request is dropped
RUNNING_S = 30  # without a renewal by the worker for this long, its request is no longer held
STREAM_S = 120
TAKEN_S = 20  # how long Redis remembers that a worker took a request
LONGEST_RETRY_S = 60  # OpenAI's clients do not wait longer than this

# Shared by the scripts. `alive` returns whether a waiting request still has a reader, and removes it if not.
_SHARED = """
local people, running = 'generation:people', 'generation:running'
local function line_of(person) return 'generation:waiting:' .. person end
local function alive(person, rid)
  if redis.call('EXISTS', 'reading:' .. rid, 'generation:request:' .. rid) == 2 then return true end
  redis.call('ZREM', line_of(person), rid)
  redis.call('DEL', 'generation:request:' .. rid)
  return false
end
local function last_turn()
  return tonumber(redis.call('ZREVRANGE', people, 0, 0, 'WITHSCORES')[2] or 0) + 1
end
local clock = redis.call('TIME')
local now = tonumber(clock[1])
redis.call('ZREMRANGEBYSCORE', running, '-inf', now)
"""

# ARGV: owner, rid, request, arrival ('' the first time), seconds, limits (of one, of all, bytes of one, of all), share
_ENTER = (
    _SHARED
    + """
local owner, rid, request, arrival = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local count, bytes, own_count, own_bytes = 0, #request, 0, #request
for _, person in ipairs(redis.call('ZRANGE', people, 0, -1)) do
  local left = 0
  for _, other in ipairs(redis.call('ZRANGE', line_of(person), 0, -1)) do
    if alive(person, other) then
      local size = redis.call('STRLEN', 'generation:request:' .. other)
      left, count, bytes = left + 1, count + 1, bytes + size
      if person == owner then own_count, own_bytes = own_count + 1, own_bytes + size end
    end
  end
  if left == 0 then redis.call('ZREM', people, person) end
end
if arrival == '' then
  local seconds = tonumber(redis.call('GET', 'generation:seconds') or 1)
  if own_count >= tonumber(ARGV[6]) or own_bytes > tonumber(ARGV[8]) then
    return {'yours', tostring(own_count * seconds / tonumber(ARGV[10]))}
  end
  if count >= tonumber(ARGV[7]) or bytes > tonumber(ARGV[9]) then
    return {'full', tostring(count * seconds / math.max(1, redis.call('ZCARD', running)))}
  end
  arrival = string.format('%d', now * 1000000 + clock[2])
end
redis.call('SET', 'generation:request:' .. rid, request, 'EX', ARGV[5])
redis.call('SET', 'reading:' .. rid, 1, 'EX', ARGV[5])
redis.call('ZADD', line_of(owner), arrival, rid)
if not redis.call('ZSCORE', people, owner) then redis.call('ZADD', people, last_turn(), owner) end
return {'ok', arrival}
"""
)

# ARGV: owner, rid, seconds. Returns the request's state, the number of messages in the workers' queue, and whether any
# request is being served.
_RENEW = (
    _SHARED
    + """
local owner, rid = ARGV[1], ARGV[2]
redis.call('SET', 'reading:' .. rid, 1, 'EX', ARGV[3])
if redis.call('ZSCORE', running, rid) then return {'running', 0, 0} end
if redis.call('ZSCORE', line_of(owner), rid) and redis.call('EXPIRE', 'generation:request:' .. rid, ARGV[3]) == 1 then
  local served = redis.call('ZCARD', running) + redis.call('EXISTS', 'generation:taken')
  return {'waiting', redis.call('LLEN', 'inference'), served}
end
return {'lost', 0, 0}
"""
)

# ARGV: share, then the lifetimes in seconds of a hold, of the stream, and of the key `generation:taken`. Returns the next
# request and its owner.
_TAKE = (
    _SHARED
    + """
for _, person in ipairs(redis.call('ZRANGE', people, 0, -1)) do
  local held = running .. ':' .. person
  redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
  if redis.call('ZCARD', held) < tonumber(ARGV[1]) then
    local rid = redis.call('ZRANGE', line_of(person), 0, 0)[1]
    while rid and not alive(person, rid) do rid = redis.call('ZRANGE', line_of(person), 0, 0)[1] end
    if rid then
      local request = redis.call('GET', 'generation:request:' .. rid)
      redis.call('DEL', 'generation:request:' .. rid)
      redis.call('ZREM', line_of(person), rid)
      redis.call('ZADD', running, now + ARGV[2], rid)
      redis.call('ZADD', held, now + ARGV[2], rid)
      redis.call('EXPIRE', held, ARGV[2])
      redis.call('XADD', 'tokens:' .. rid, '1-0', 'line', '{"t":"taken"}')
      redis.call('EXPIRE', 'tokens:' .. rid, ARGV[3])
      redis.call('SET', 'generation:taken', 1, 'EX', ARGV[4])
      if redis.call('EXISTS', line_of(person)) == 1 then
        redis.call('ZADD', people, last_turn(), person)
      else
        redis.call('ZREM', people, person)
      end
      return {person, rid, request}
    end
    redis.call('ZREM', people, person)
  end
end
return false
"""
)

# ARGV: owner, rid, seconds of a hold. Returns 0 if the response no longer has a reader.
_HOLD = """
local now, running = tonumber(redis.call('TIME')[1]), 'generation:running'
for _, held in ipairs({running, running .. ':' .. ARGV[1]}) do redis.call('ZADD', held, now + ARGV[3], ARGV[2]) end
redis.call('EXPIRE', running .. ':' .. ARGV[1], ARGV[3])
return redis.call('EXISTS', 'reading:' .. ARGV[2])
"""

# ARGV: owner, rid, seconds it took
_END = """
for _, held in ipairs({'generation:running', 'generation:running:' .. ARGV[1]}) do redis.call('ZREM', held, ARGV[2]) end
local before = tonumber(redis.call('GET', 'generation:seconds') or ARGV[3])
redis.call('SET', 'generation:seconds', tostring(before * 0.9 + ARGV[3] * 0.1), 'EX', 3600)
"""


class Full(Exception):
    """The queue is full: `whose` is "yours" (this user's limit is reached) or "full" (the overall limit is)."""

    def __init__(self, whose: str, retry_after: float) -> None:
        self.whose = whose
        self.retry_after = max(1, min(LONGEST_RETRY_S, math.ceil(retry_after)))
        super().__init__(whose)


@dataclass(frozen=True)
class State:
    """The state of a request: "waiting", "running", or "lost" (by Redis or its worker)."""

    word: str
    notifications: int  # messages that are waiting in the workers' queue
    served: bool  # whether any request is being served


@dataclass(frozen=True)
class Taken:
    owner: str
    rid: str
    request: str


def line_of(owner: str) -> str:
    return f"generation:waiting:{owner}"


# ---- the reader's side ---------------------------------------------------------------------------------------------


async def enter(client: Any, owner: str, rid: str, request: str, arrival: str, share: int) -> str:
    """Puts a request into the queue and returns its time of arrival. Pass `arrival` for a request that was lost by Redis or a
    worker, so that it keeps its place. Raises Full."""
    limits = (MAX_WAITING_OF_ONE, MAX_WAITING, MAX_BYTES_OF_ONE, MAX_BYTES)
    word, value = await client.eval(
        _ENTER, 0, owner, rid, request, arrival, RENEWAL_TIMEOUT_S, *limits, share
    )
    if word != "ok":
        raise Full(word, float(value))
    return str(value)


async def renew(client: Any, owner: str, rid: str) -> State:
    word, notifications, served = await client.eval(_RENEW, 0, owner, rid, RENEWAL_TIMEOUT_S)
    return State(word, int(notifications), bool(served))


async def leave(client: Any, owner: str, rid: str) -> None:
    """Removes a request whose reader has its response or no longer wants it. A worker that holds the request notices this."""
    pipe = client.pipeline(transaction=False)
    pipe.delete(f"reading:{rid}", f"tokens:{rid}", f"generation:request:{rid}")
    pipe.zrem(line_of(owner), rid)
    await pipe.execute()


# ---- the worker's side ---------------------------------------------------------------------------------------------


def take(share: int) -> Taken | None:
    """The next request of the user whose turn it is; None if no waiting user has fewer than `share` running."""
    row = redis_client.client().eval(_TAKE, 0, share, RUNNING_S, STREAM_S, TAKEN_S)
    return Taken(*row) if row else None


def hold(owner: str, rid: str) -> bool:
    """Renews the worker's hold. Returns False if the response no longer has a reader."""
    return bool(redis_client.client().eval(_HOLD, 0, owner, rid, RUNNING_S))


def end(owner: str, rid: str, seconds: float) -> None:
    redis_client.client().eval(_END, 0, owner, rid, f"{seconds:.3f}")
