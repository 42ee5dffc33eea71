"""The way to Redis: scripts of one round trip each, and a breaker for when it is away."""

import asyncio
import contextlib
import contextvars
import hashlib
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from app.core.config.state import StateSettings
from app.core.logging import get_logger
from app.core.metrics import Metrics
from app.utils.errors import ConfigurationError, StateUnavailableError

log = get_logger("state")

# Stands in each key, so that a release with another form of the values does not read these.
_FORM = "1"
# How often a Redis that is away is tried.
_LOOK_SECONDS = 0.5
_FAULTS = (RedisError, OSError, TimeoutError)

Argument = str | bytes | int | float
T = TypeVar("T")


class Script:
    """A Lua script, which Redis runs as one step."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Redis names a script by this hash; it protects nothing.
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


NOTE = """
local function note(index, key, milliseconds, most)
  -- Adds a key to its owner's index, and deletes those of the owner that expire first past `most`.
  local time = redis.call('TIME')
  local now = time[1] * 1000 + time[2] / 1000
  redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
  redis.call('ZADD', index, now + milliseconds, key)
  redis.call('PEXPIRE', index, milliseconds)
  local count = redis.call('ZCARD', index)
  while count > tonumber(most) do
    redis.call('DEL', redis.call('ZPOPMIN', index)[1])
    count = count - 1
  end
  return count
end
"""
"""A function for scripts that keep something: the number of an owner's keys is bounded."""

RELEASE = Script("return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1])")
"""Deletes a key if it has this value."""


class RedisLink:
    """Runs scripts; to be entered before use.

    After one call that fails or takes longer than ``state.timeout_seconds`` all others fail at
    once, until a write in the background has succeeded.

    Raises:
        ConfigurationError: ``state.url`` is no URL of a Redis.
    """

    def __init__(self, settings: StateSettings, metrics: Metrics) -> None:
        self._timeout = settings.timeout_seconds
        self._prefix = f"{settings.prefix}:{_FORM}"
        try:
            pool = BlockingConnectionPool.from_url(
                settings.url.get_secret_value(),
                max_connections=settings.connections,
                # The one limit on a call counts the wait for a connection too.
                timeout=None,
                socket_timeout=None,
                socket_connect_timeout=None,
                # What may be repeated is repeated here.
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                # Each new connection would read the library's version from the disk.
                driver_info=None,
            )
        except ValueError:
            raise ConfigurationError(
                "configuration error: state.url is not a URL such as redis://localhost:6379/0"
            ) from None
        self._redis = Redis.from_pool(pool)
        # The library gives it no types.
        self._execute: Any = self._redis.execute_command
        self._failures = metrics.state_failures
        self._up = metrics.state_up.labels("redis")
        self._is_up = True
        self._tasks: set[asyncio.Task[Any]] = set()
        self._healing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Say at once in the log whether Redis answers; a service starts without it too."""
        try:
            await self._probe()
        except _FAULTS as error:
            self._lose(error)
        else:
            self._up.set(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Finish what is under way, within ``state.timeout_seconds``, and disconnect."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timeout)
        for task in (*self._tasks, *filter(None, [self._healing])):
            task.cancel()
        self._is_up = False
        await self._redis.aclose(close_connection_pool=True)

    @property
    def is_up(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._is_up

    def key(self, *parts: str) -> str:
        """The name of a key."""
        return ":".join((self._prefix, *parts))

    async def run(
        self,
        part: str,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        *,
        repeatable: bool = True,
    ) -> Any:
        """What a script returns for these keys and arguments.

        ``part`` is that of the shared state, for the metric. Where the connection broke, a script
        is run again if it is ``repeatable``: if it does no harm where it has run before.

        Raises:
            StateUnavailableError: Redis is away; the script may have run.
        """
        if self._is_up:
            command = (len(keys), *keys, *arguments)
            try:
                async with asyncio.timeout(self._timeout):
                    try:
                        return await self._evaluate(script, command)
                    except RedisConnectionError:
                        if not repeatable:
                            raise
                        return await self._evaluate(script, command)
            except _FAULTS as error:
                self._lose(error)
        self._failures.labels(part).inc()
        raise StateUnavailableError

    async def _evaluate(self, script: Script, command: Sequence[Argument]) -> Any:
        try:
            return await self._execute("EVALSHA", script.sha, *command)
        except NoScriptError:
            return await self._execute("EVAL", script.text, *command)

    async def claim(
        self,
        part: str,
        script: Script,
        keys: Sequence[str],
        key: str,
        value: str | bytes,
        *arguments: Argument,
    ) -> Any:
        """What a script returns that may give ``key`` this value, for a lease, its next argument.

        Where the caller leaves before it knows, the claim is given back.

        Raises:
            StateUnavailableError: See :meth:`run`.
        """
        task = self.begin(self.run(part, script, keys, (value, *arguments)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Not at once: on another connection it could overtake the claim.
            task.add_done_callback(lambda _: self.begin(self.release(part, key, value)))
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something in a task that outlives the request."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def release(self, part: str, key: str, value: str | bytes) -> None:
        """Delete a key that has this value; where that fails its lease runs out."""
        if self._is_up:
            with contextlib.suppress(StateUnavailableError):
                await self.run(part, RELEASE, [key], [value])

    async def _probe(self) -> None:
        # A Redis that is full, or a replica of another one, answers but takes no writes.
        async with asyncio.timeout(self._timeout):
            await self._redis.set(self.key("probe"), 1, px=1000)

    def _lose(self, error: BaseException) -> None:
        if not self._is_up:
            return
        self._is_up = False
        self._up.set(0)
        # The message may repeat the URL, which has the password.
        log.error("shared state: Redis is away (%s)", type(error).__name__)
        self._healing = asyncio.create_task(self._heal(), context=contextvars.Context())

    async def _heal(self) -> None:
        while True:
            try:
                await self._probe()
            except _FAULTS:
                await asyncio.sleep(_LOOK_SECONDS)
            else:
                break
        self._is_up = True
        self._up.set(1)
        log.warning("shared state: Redis is back")
