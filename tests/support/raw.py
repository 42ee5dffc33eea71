"""HTTP as bytes on a socket, for requests that no HTTP client would send."""

import socket
import time
from dataclasses import dataclass
from http.client import parse_headers
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from tests.support.service import API_KEY, Service

# Longest time in seconds that a test waits for the service.
PATIENCE = 30.0


@dataclass(frozen=True)
class Answer:
    """One response, with header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of the error in the body."""
        code: str = msgspec.json.decode(self.body)["error"]["code"]
        return code


def request(
    method: str, path: str, *headers: str, body: bytes = b"", host: str = "Host: localhost"
) -> bytes:
    """A request as bytes, with these headers and no others."""
    lines = [f"{method} {path} HTTP/1.1", host, *headers, "", ""]
    return "\r\n".join(line for line in lines[:-2] if line).encode() + b"\r\n\r\n" + body


def chunked(*pieces: bytes, trailers: bytes = b"") -> bytes:
    """A body in chunks."""
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"


LIVEZ = request("GET", "/livez")
KEY = f"X-API-Key: {API_KEY}"


def post(*headers: str, body: bytes = b"", path: str = "/v1/generate") -> bytes:
    """A POST with these headers; a length is not added."""
    return request("POST", path, *headers, body=body)


def generate_request(body: dict[str, Any]) -> bytes:
    """A whole request to /v1/generate."""
    content = msgspec.json.encode(body)
    return post(KEY, f"Content-Length: {len(content)}", body=content)


def large_answers(*, stream: bool) -> bytes:
    """Requests with answers of 3 MB, for a client that takes little and reads nothing.

    They are more than all buffers on the way to it hold.
    """
    body = {
        "model": "echo",
        "messages": [{"role": "user", "content": "\1" * 500}],
        "max_tokens": 500,
        "n": 4,
        "logprobs": True,
        "stream": stream,
    }
    content = msgspec.json.encode(body)
    length = f"Content-Length: {len(content)}"
    return post(KEY, length, body=content, path="/v1/chat/completions") * 17


class RawClient:
    """A connection to a service."""

    def __init__(
        self, service: Service, *, source: str = "127.0.0.1", receive_buffer: int | None = None
    ) -> None:
        url = httpx.URL(service.base_url)
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # The kernel's buffer for an answer is a number of segments, which have 64 KiB here.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 500)
        self.socket.bind((source, 0))
        self.socket.connect((url.host, url.port))
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self.socket.close()

    def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        """Send pieces, with a pause in seconds after each."""
        for piece in pieces:
            self.socket.sendall(piece)
            time.sleep(pause)

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next response."""
        line = self._file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        return int(line.split()[1]), {k.lower(): v for k, v in parse_headers(self._file).items()}

    def answer(self, *, method: str = "GET") -> Answer:
        """The next response, whole."""
        status, headers = self.head()
        if method == "HEAD" or status == 100:
            return Answer(status, headers, b"")
        if "content-length" in headers:
            body = self._file.read(int(headers["content-length"]))
        else:
            body = b"".join(self._chunks())
        return Answer(status, headers, body)

    def _chunks(self) -> list[bytes]:
        found = []
        while size := int(self._file.readline(), 16):
            found.append(self._file.read(size))
            self._file.readline()
        self._file.readline()
        return found

    def ask(self, data: bytes) -> Answer:
        """Send a request, and read its answer."""
        self.send(data)
        return self.answer()

    def rest(self) -> bytes:
        """All bytes until the service ends the connection, which it must do."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""

    def ended(self) -> bool:
        """Whether the service has ended the connection; what it has sent is discarded."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(65_536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)
        return True

    def drip(self, piece: bytes, pause: float = 0.05) -> None:
        """Send a piece again and again until the service has ended the connection."""
        end = time.monotonic() + PATIENCE
        try:
            while not self.ended():
                assert time.monotonic() < end, "the connection was not ended"
                self.send(piece, pause=pause)
        except ConnectionError:
            pass
