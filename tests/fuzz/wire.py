"""Sends bytes to sockets: valid HTTP, mutated HTTP, and other bytes.

Each case is one connection. It sends a valid request of any kind, mutated at random. The response
must be HTTP, must not be a 500, and must end.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from benchmarks import vitals
from tests.support.service import API_KEY, Service

# A case is over after so much silence.
_QUIET_SECONDS = 0.05
# Longest time until a connection ends after the client has closed its half.
_END_SECONDS = 30.0
_MAX_FAILURES = 20
_MAY_STAY = ("sessions",)

SETTINGS = {
    # A line for each of a million refusals would fill a disk.
    "LOGGING__LEVEL": "ERROR",
    "PII__INPUT": "redact",
    "PII__OUTPUT": "redact",
}
"""Settings of the fuzzed service."""

_KEY = f"X-API-Key: {API_KEY}\r\n".encode()
_HOST = b"Host: localhost\r\n"
_BODIES: dict[str, list[object]] = {
    "/v1/generate": [
        {"prompt": "hello", "max_tokens": 4},
        {"prompt": "hello", "max_tokens": 4, "stream": True},
        {"prompt": "call 415-555-2671 or a@b.co", "stop": ["or"], "cache": False},
        [],
    ],
    "/v1/chat": [
        {"messages": [{"role": "user", "content": "hi"}], "session_id": "s", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "\u00e9\U0001f600"}], "stream": True},
    ],
    "/v1/chat/completions": [
        {"model": "default", "messages": [{"role": "user", "content": "hi"}], "n": 2},
        {"model": "default", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ],
    "/v1/completions": [{"model": "default", "prompt": ["a", "b"], "max_tokens": 2}],
    "/v1/responses": [
        {"model": "default", "input": "hi", "conversation": "s"},
        {"model": "default", "input": [{"role": "user", "content": "hi"}], "stream": True},
    ],
    "/v1/tokenize": [{"text": "hello"}],
}
_GETS = ("/livez", "/readyz", "/health", "/status", "/v1/models", "/v1/sessions/s", "/nothing")

# Parts of HTTP, and bytes that have broken servers.
_TOKENS = (
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b"\xff", b"\x80", b" ", b"\t", b":", b",", b";"),
    *(b"GET ", b"POST ", b"BREW ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"PRI * "),
    *(b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Content-Length: 5, 6\r\n", b"+5", b"0x5"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding : "),
    *(
        b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n",
        b"Upgrade: h2c\r\n",
    ),
    *(
        b"Expect: 100-continue\r\n",
        b"Host: a\r\n",
        b"Cookie: " + b"a" * 300 + b"\r\n",
        b" folded\r\n",
    ),
    *(b"X-Request-Timeout: 0.01\r\n", b"Idempotency-Key: k\r\n", b"X-Session-ID: s\r\n"),
    *(b"0\r\n\r\n", b"5\r\nhello\r\n", b"fffffffff\r\n", b"1;a=b\r\nx\r\n", b"-1\r\n"),
    *(
        b"/",
        b"//",
        b"..",
        b"%2e%2e",
        b"%00",
        b"%",
        b"?a=b",
        b"#f",
        b"*",
        b"http://h/livez",
        b"h:443",
    ),
    *(b'"', b"\\", b"\\ud800", b"{", b"[", b"[" * 64, b"1e999", b"null", b"\xc3", b"\xed\xa0\x80"),
)


def seeds() -> list[bytes]:
    """Valid requests for every route, whole, in chunks, and several on a connection."""
    found = [b"GET %s HTTP/1.1\r\n%s%s\r\n" % (path.encode(), _HOST, _KEY) for path in _GETS]
    found.append(b"DELETE /v1/sessions/s HTTP/1.1\r\n" + _HOST + _KEY + b"\r\n")
    found.append(b"OPTIONS * HTTP/1.1\r\n" + _HOST + b"\r\n")
    for path, bodies in _BODIES.items():
        for body in map(msgspec.json.encode, bodies):
            head = b"POST %s HTTP/1.1\r\n%s%s" % (path.encode(), _HOST, _KEY)
            found.append(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
            chunks = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (
                *(3, body[:3]),
                *(max(1, len(body) - 3), body[3:] or b" "),
            )
            found.append(b"%sTransfer-Encoding: chunked\r\n\r\n%s" % (head, chunks))
    return [*found, *(a + b for a, b in pairwise(found[::3])), b""]


class Mutator:
    """Makes cases: first the seeds, then mutations of them."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._seeds = seeds()
        self._unsent = seeds()

    def case(self) -> list[bytes]:
        """One case, as the pieces in which it is sent."""
        if self._unsent:
            return [self._unsent.pop()]
        random = self._random
        data = bytearray(random.choice(self._seeds))
        # One in eight is not mutated, so that valid requests are always among the others.
        for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5, 9))):
            self._mutate(data)
        cuts = sorted(random.randint(0, len(data)) for _ in range(random.choice((0, 0, 0, 1, 2))))
        return [bytes(data[a:b]) for a, b in pairwise([0, *cuts, len(data)])]

    def _mutate(self, data: bytearray) -> None:
        random = self._random
        at = random.randint(0, len(data))
        end = min(len(data), at + random.choice((1, 1, 2, 4, 16, 64)))
        kind = random.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * random.choice((1, 2, 30))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            other = random.choice(self._seeds)
            data[at:] = other[random.randint(0, len(other)) :]
        else:
            # Twice as often at the beginning of a line, where headers are.
            line = data.rfind(b"\n", 0, at) + 1
            data[random.choice((at, line, line)) : random.choice((at, at, end))] = random.choice(
                _TOKENS
            )


@dataclass
class Findings:
    """The result of a run.

    Attributes:
        cases: Number of cases that were sent.
        statuses: Number of responses by status.
        failures: Each fault, with the bytes that caused it.
        seconds: Duration of the run.
    """

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Exchange(asyncio.Protocol):
    """One connection, which reads HTTP responses one after another.

    It is a protocol, because asyncio's streams lose what came before a reset.
    """

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.fault: str | None = None
        self.ended = asyncio.Event()
        self._news = asyncio.Event()
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)

    async def quiet(self) -> None:
        """Wait until the connection has ended, or nothing has come for ``_QUIET_SECONDS``."""
        with suppress(TimeoutError):
            while not self.ended.is_set():
                self._news.clear()
                async with asyncio.timeout(_QUIET_SECONDS):
                    await self._news.wait()

    # --- asyncio.Protocol ---

    def data_received(self, data: bytes) -> None:
        self._news.set()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fault = "it changed the protocol"
        except httptools.HttpParserError as error:
            self.fault = self.fault or f"no HTTP came back ({error}): {data[:200]!r}"

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self._news.set()

    # --- httptools' callbacks ---

    def on_message_begin(self) -> None:
        self._body = b""

    def on_headers_complete(self) -> None:
        self.statuses.append(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self.statuses[-1] == 500:
            self.fault = f"500: {self._body!r}"


def vitals_of(service: Service) -> dict[str, float]:
    """What the service uses, except memory and the sessions that cases may open."""
    counts = vitals.counts(service.process.pid, service.get("/metrics").text)
    return {name: count for name, count in counts.items() if name not in _MAY_STAY}


def leaks(service: Service, before: dict[str, float]) -> list[str]:
    """What the service still uses more of than before after ``_END_SECONDS``."""
    end = time.monotonic() + _END_SECONDS
    while (found := vitals.leaks(before, vitals_of(service))) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def complaints(service: Service) -> list[str]:
    """Errors in the service's log; no bytes of a client should cause one."""
    return [str(line)[-2000:] for line in service.log() if line["level"] in ("ERROR", "CRITICAL")]


async def warm_up(service: Service) -> dict[str, float]:
    """Send the seeds, which open what stays open; return the vitals after that."""
    found = await run(service.base_url, len(seeds()), 0)
    assert not found.failures, found.failures
    time.sleep(1.0)  # noqa: ASYNC251 - nothing else runs here
    return vitals_of(service)


async def run(base_url: str, cases: int, seed: int, connections: int = 48) -> Findings:
    """Send ``cases`` over ``connections`` at a time; end early after 20 failures."""
    url = urlsplit(base_url)
    address = (cast("str", url.hostname), cast("int", url.port))
    mutator, found = Mutator(seed), Findings()
    started = time.perf_counter()

    def next_cases() -> Iterator[list[bytes]]:
        while found.cases < cases and len(found.failures) < _MAX_FAILURES:
            found.cases += 1
            yield mutator.case()

    async def client() -> None:
        for pieces in next_cases():
            try:
                exchange = await _send(address, pieces)
            except OSError as error:
                found.failures.append(f"no connection: {error!r}\n{pieces!r}")
                continue
            found.statuses.update(exchange.statuses)
            if exchange.fault is not None:
                found.failures.append(f"{exchange.fault}\n{pieces!r}")

    await asyncio.gather(*(client() for _ in range(connections)))
    found.seconds = time.perf_counter() - started
    return found


async def _send(address: tuple[str, int], pieces: list[bytes]) -> _Exchange:
    """Send one case, close the client's half, and wait for the end."""
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(_Exchange, *address)
    try:
        for piece in pieces:
            transport.write(piece)
            await asyncio.sleep(0)
        await exchange.quiet()
        if not exchange.ended.is_set():
            # The service may have reset the connection meanwhile.
            with suppress(OSError):
                transport.write_eof()
        async with asyncio.timeout(_END_SECONDS):
            await exchange.ended.wait()
    except TimeoutError:
        exchange.fault = exchange.fault or "the connection was not ended"
    finally:
        transport.abort()
    return exchange
