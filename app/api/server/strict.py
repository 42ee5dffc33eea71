"""uvicorn's HTTP/1.1 protocol, refusing the little that its parser lets through.

llhttp, which uvicorn uses through httptools, was the strictest of the parsers compared
(docs/adr/0020-connections.md). What it takes beyond RFC 9112 is refused here.
"""

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class StrictProtocol(HttpToolsProtocol):
    """Takes HTTP/1.1 and 1.0 with one Host, keeps trailers from headers, and never upgrades."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._upgrading = False

    def parse(self, piece: bytes) -> None:
        """Take what has come next.

        Raises:
            httptools.HttpParserError: It is not HTTP, or not a request that is answered here.
        """
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as found:
            self.parse(self._without_upgrade() + piece[found.args[0] :])

    def _without_upgrade(self) -> bytes:
        """The head that has come, without its wish for another protocol, for a new parser.

        A server may ignore the wish, but the parser stops where the other protocol would begin,
        and would lose the body and every further request. Java's HTTP client sends such requests.
        """
        self._upgrading = False
        head = [b"%s %s HTTP/%s\r\n" % (self._method, self.url, self._version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                kept = b", ".join(token for token in tokens if token.lower() != b"upgrade")
                head.append(b"connection: %s\r\n" % kept)
            elif name != b"upgrade":
                head.append(b"%s: %s\r\n" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"".join([*head, b"\r\n"])

    def on_headers_complete(self) -> None:
        """The head has come.

        Raises:
            ValueError: It is no request that is answered here.
        """
        self._method = self.parser.get_method()
        self._version = self.parser.get_http_version().encode()
        if self.parser.should_upgrade() and self._method != b"CONNECT":
            self._upgrading = True
            return
        hosts = [name for name, _ in self.headers].count(b"host")
        if self._version not in (b"1.0", b"1.1") or hosts > 1 or hosts < (self._version == b"1.1"):
            raise ValueError("not HTTP/1.1, or not one Host")
        self.on_request()

    def on_request(self) -> None:
        """A head that is answered here has come; its body may follow."""
        super().on_headers_complete()
        # Behind the body may stand trailers. uvicorn would put them among the headers, where a
        # proxy that removes headers it does not want to pass on has not looked for them.
        self.headers = []

    def on_message_complete(self) -> None:
        """The request has come whole."""
        if not self._upgrading:
            self.on_request_complete()

    def on_request_complete(self) -> None:
        """The request has come whole."""
        super().on_message_complete()

    def _should_upgrade_to_ws(self) -> bool:
        # There are no WebSockets here.
        return False
