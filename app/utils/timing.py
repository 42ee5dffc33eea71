"""Clocks and durations."""

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TypeVar

from app.utils.errors import DeadlineExceededError

T = TypeVar("T")


def utc_timestamp(epoch_seconds: float) -> str:
    """ISO 8601 in UTC with milliseconds and a Z: ``2024-01-01T12:00:00.000Z``."""
    stamp = datetime.fromtimestamp(epoch_seconds, tz=UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def within(deadline: float | None, work: Awaitable[T]) -> T:
    """Await ``work``, and cancel it at ``deadline``, a time of the running event loop.

    Raises:
        DeadlineExceededError: The deadline passed.
    """
    if deadline is None:
        # A timeout costs more than the rest of a token's way through a reader.
        return await work
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise DeadlineExceededError from None
        raise
