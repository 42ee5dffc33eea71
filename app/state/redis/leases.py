"""What this process has claimed in Redis, renewed until it is given back."""

import asyncio
import contextlib

from app.state.redis.link import RedisLink, Script
from app.utils.errors import StateUnavailableError

DELETED = "~"
"""The value of a claimed key whose object was deleted meanwhile; the end of the claim sees it."""

_RENEW = Script(f"""
for i, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if value == ARGV[i + 1] or value == '{DELETED}' then redis.call('PEXPIRE', key, ARGV[1]) end
end
""")


class Leases:
    """Keys that are deleted by Redis soon after this process was killed.

    Attributes:
        milliseconds: How soon.
    """

    def __init__(self, link: RedisLink, seconds: float) -> None:
        self.milliseconds = round(seconds * 1000)
        self._link = link
        self._pause = seconds / 3
        self._held: dict[str, str | bytes] = {}
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, key: str, value: str | bytes) -> None:
        """Renew a key's lease, as long as it has this value."""
        self._held[key] = value
        if self._timer is None:
            self._wait()

    def drop(self, key: str) -> None:
        """Renew it no more."""
        self._held.pop(key, None)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._act)

    def _act(self) -> None:
        if not self._held:
            self._timer = None
            return
        self._link.begin(self._renew(dict(self._held)))
        self._wait()

    async def _renew(self, held: dict[str, str | bytes]) -> None:
        # Where this fails it is tried again, until the leases have run out.
        with contextlib.suppress(StateUnavailableError):
            await self._link.run("leases", _RENEW, list(held), (self.milliseconds, *held.values()))
