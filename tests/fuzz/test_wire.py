"""The service gets valid HTTP, mutated HTTP, and other bytes."""

import asyncio

import pytest

from tests.fuzz import wire
from tests.support.service import running_service

CASES = 2000


@pytest.mark.no_cover
async def test_no_bytes_break_the_service() -> None:
    """No bytes cause a 500, a connection that hangs, an error in the log or a leak."""
    with running_service(**wire.SETTINGS) as service:
        before = await wire.warm_up(service)
        found = await wire.run(service.base_url, CASES, seed=1)
        assert not found.failures, "\n".join(found.failures)
        # Both valid and invalid requests were among them.
        assert min(found.statuses[status] for status in (200, 400, 401, 404, 422)) > CASES / 100
        assert wire.leaks(service, before) == []
        assert wire.complaints(service) == []


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno", "500: b'no'"),
        (b"Segmentation fault\n", "no HTTP came back"),
        (None, "the connection was not ended"),
    ],
)
async def test_what_breaks_is_found(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, fault: str
) -> None:
    """A server that answers 500 or no HTTP, or that hangs, is reported."""
    monkeypatch.setattr(wire, "_END_SECONDS", 0.2)
    over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        if answer is None:
            await over.wait()
        else:
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        found = await wire.run(f"http://{host}:{port}", 3, seed=1, connections=1)
        over.set()
    assert [failure.startswith(fault) for failure in found.failures] == [True] * 3
