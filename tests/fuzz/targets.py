"""Fuzz targets: functions of bytes that raise if the code that they test is wrong.

Hypothesis runs each in the suite, and a coverage-guided fuzzer in ``make fuzz``. The bytes choose
pieces that matter to the code, how they are joined, and where they are cut.
"""

import ipaddress
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.api.body import parse_json
from app.api.errors import validation_error
from app.api.openai.schemas import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from app.api.requests import ChatRequest, GenerateRequest
from app.api.sse import ends_stream, frame, has_error_event
from app.core.config.security import SecuritySettings
from app.core.pii.detectors import HOLD_BACK
from app.core.rate_limit import ClientAddress
from app.core.security import KeyRing
from app.llm.detokenizer import StopMatcher
from app.llm.models.gguf_header import MAGIC, read_header
from app.llm.tool_calls import CallPiece, ToolCallParser
from app.utils.errors import InvalidAPIKeyError, InvalidJSONError
from benchmarks.load.targets import read_stream
from tests.data import pii_cases
from tests.support.sse import data_lines
from tests.unit import test_output_filter, test_pii, test_tools

Target = Callable[[bytes], None]


class Source:
    """Turns bytes into choices; when they are used up, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        """Whether all bytes are used up."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """The next byte, or 0."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def rest(self) -> bytes:
        """All bytes that are left."""
        rest, self._at = self._data[self._at :], len(self._data)
        return rest

    def text(self, pieces: Sequence[str], length: int | None = None) -> str:
        """A text of pieces and random characters, made of all bytes that are left."""
        out: list[str] = []
        while not self.is_empty and (length is None or len(out) < length):
            choice = self.byte()
            # A fifth of the choices are random characters.
            out.append(pieces[choice % len(pieces)] if choice < 204 else chr(self._code_point()))
        return "".join(out)

    def _code_point(self) -> int:
        kind, low = self.byte(), self.byte()
        return low if kind < 128 else min(0x10FFFF, (kind - 128) * 0x2100 + low)

    def cuts(self) -> list[float]:
        """The places where a text is cut, as shares of its length."""
        return sorted(self.byte() / 255 for _ in range(self.byte() % 16))


def cut(text: str, shares: Sequence[float]) -> list[str]:
    """The pieces of a text."""
    places = [0, *(int(share * len(text)) for share in shares), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


# --- Text on its way out --------------------------------------------------------------------------


def pii(data: bytes) -> None:
    """A stream is redacted as the whole text is, however it is cut, and holds little back."""
    source = Source(data)
    scanner = (test_pii.SCANNER, test_pii.CUSTOM)[source.byte() % 2]
    shares = source.cuts()
    text = source.text(pii_cases.PIECES)
    whole, counts = scanner.redact(text)
    assert whole == test_pii.at_once(scanner, text)
    redactor, out = scanner.stream(), ""
    for piece in cut(text, shares):
        out += redactor.feed(piece)
        assert redactor.held <= HOLD_BACK
    assert out + redactor.flush() == whole
    assert redactor.counts == counts


def output(data: bytes) -> None:
    """A stream is filtered as the whole text is, and no template token is left in it."""
    source = Source(data)
    rules = (test_output_filter.BOTH, test_output_filter.TOKENS_ONLY)[source.byte() % 2]
    shares = source.cuts()
    text = source.text(test_output_filter.PIECES)
    whole = test_output_filter.clean(rules, text)
    assert test_output_filter.stream(rules, cut(text, shares)) == whole
    assert not any(token in whole.text for token in test_output_filter.TOKENS if token.strip())


_LETTERS = ("a", "b", "c", "aa", "ab", "abc", "\n", "</s>", "\u00e9", "\U0001f600")


def stops(data: bytes) -> None:
    """An answer ends at the same place however it is cut, and has no stop string in it."""
    source = Source(data)
    wanted = [source.text(_LETTERS, 1 + source.byte() % 4) for _ in range(1 + source.byte() % 4)]
    wanted = [stop for stop in wanted if stop]
    shares = source.cuts()
    text = source.text(_LETTERS)
    assert _until_stop(wanted, cut(text, shares)) == _until_stop(wanted, list(text))


def _until_stop(wanted: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(wanted), ""
    for piece in pieces:
        passed, stopped = matcher.feed(piece)
        out += passed
        assert not any(stop in out for stop in wanted)
        if stopped:
            return out, True
    return out + matcher.flush(), False


_CALLS = (
    *("<tool_call>", "</tool_call>", "<tool_", "call>", "<|python_tag|>", " ", "\n", ";", "text"),
    *("{", "}", "[", "]", '"', "\\", ":", ",", "1", "null", '{"name": "add", "arguments": ', "{}}"),
    *('{"name": "add", "parameters": ', '{"name": "nobody", "arguments": {}}', "get-weather_2"),
    *("<function=add>", "<parameter=a>", "\n</parameter>", "</function>", "<|tool_call>call:add{"),
    *('<|"|>', "<tool_call|>", "a:", "```json", "```", "<para", "True"),
)
_FORMS = (
    test_tools.HERMES,
    test_tools.LLAMA,
    *(test_tools.QWEN35, test_tools.GEMMA3, test_tools.GEMMA4),
)


def tools(data: bytes) -> None:
    """Calls and text are the same however an answer is cut, and arguments are passed on whole."""
    source = Source(data)
    form = _FORMS[source.byte() % len(_FORMS)]
    shares = source.cuts()
    text = source.text(_CALLS)
    found = _calls(form, [text])
    assert _calls(form, cut(text, shares)) == found
    assert _calls(form, list(text)) == found


def _calls(form: Any, pieces: Sequence[str]) -> tuple[str, list[list[str]]]:
    parser = ToolCallParser(form, test_tools.NAMES)
    said, calls = "", list[list[str]]()
    for made in (*(p for piece in pieces for p in parser.feed(piece)), *parser.flush()):
        if isinstance(made, str):
            said += made
            continue
        assert isinstance(made, CallPiece)
        if made.name is not None:
            assert made.index == len(calls)
            calls.append([made.name, made.arguments])
        else:
            calls[made.index][1] += made.arguments
    return said, calls


# --- Server-sent events ---------------------------------------------------------------------------

_EVENTS = (
    *("\n", "\r", "\r\n", "\n\n", "data:", "data: ", ": ping", "event: x", "id: 1", "[DONE]"),
    *('{"error":', 'data: {"error":', "\u2028", "\x85", "\x00", "\ufeff", '"', "\\", "}", "{"),
    *('data: {"delta":{"text":"a"}}\n', 'data: {"choices":[{"delta":{"content":"b"}}]}\n\n'),
    *(
        'data: {"choices":[',
        "[]",
        "null",
        "1",
        '"a"',
        ',"usage":',
        '"delta":',
        '"choices":',
        "]}\n",
    ),
    *('data: {"error":{"code":', 'data: {"tokens_generated":'),
)


def events(data: bytes) -> None:
    """Any text is one event, which is read back unchanged."""
    text = Source(data).text(_EVENTS).encode("utf-8", "replace").decode()
    event = frame({"delta": {"content": text}})
    assert event.count(b"\n") == 2
    lines = list(data_lines(event.decode().split("\n")))
    assert [json.loads(line) for line in lines] == [{"delta": {"content": text}}]
    assert not ends_stream(event)
    assert not has_error_event(event)


def reading(data: bytes) -> None:
    """The load generator reads any stream the same way, however it is cut."""
    source = Source(data)
    shares = source.cuts()
    text = source.text(_EVENTS)
    pieces = [piece.encode("utf-8", "replace") for piece in cut(text, shares)]
    whole = read_stream([(0.0, text.encode("utf-8", "replace"))])
    assert read_stream([(0.0, piece) for piece in pieces]) == whole


# --- Requests -------------------------------------------------------------------------------------

_MODELS = (GenerateRequest, ChatRequest, ChatCompletionRequest, CompletionRequest, TokenizeRequest)
_JSON = (
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        '"',
        "\\",
        "\\u",
        "d800",
        "\\ud83d\\ude00",
        " ",
        "\n",
        "\ufeff",
    ),
    *("null", "true", "false", "0", "1", "-", ".", "e", "E+", "1e999", "NaN", "Infinity", "1e-400"),
    *("9" * 40, "0.1", '{"', '":', '","', '"}', '"a"', "[" * 40, "]" * 40, "\x00", "\x1f", "\x7f"),
    *('{"prompt":"a"', '{"messages":[{"role":"user","content":"a"}]', ',"stop":', ',"seed":'),
    *(',"response_format":{"type":"regex","regex":', ',"tools":[{"type":"function","function":'),
    *(',"logit_bias":{"1":', ',"stream_options":', ',"max_tokens":', ',"n":', ',"model":"m"'),
)


def requests(data: bytes) -> None:
    """A body is refused, or read as Python's parser reads it; models only raise ValidationError."""
    source = Source(data)
    body = (
        source.rest() if source.byte() % 4 == 0 else source.text(_JSON).encode("utf-8", "replace")
    )
    try:
        value = parse_json(body)
    except InvalidJSONError:
        return
    assert _same(value, json.loads(body))
    for model in _MODELS:
        try:
            made = model.model_validate(value)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            # FastAPI puts the part of the request in front of it.
            validation_error([{**fault, "loc": ("body", *fault["loc"])} for fault in faults])
        else:
            json.dumps(made.model_dump(mode="json"))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-15)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(v, theirs[k]) for k, v in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return type(ours) is type(theirs) and bool(ours == theirs)


_HEADER = (
    *(
        "10.0.0.1",
        "127.0.0.1",
        "203.0.113.7",
        "::1",
        "::ffff:10.0.0.1",
        "fe80::1%eth0",
        "1.2.3.4:80",
    ),
    *(
        "[::1]:443",
        "unknown",
        "_x",
        ",",
        ", ",
        " ",
        "\t",
        "for=",
        '"',
        ";",
        "Bearer ",
        "bearer",
        "Basic ",
    ),
    *("fuzz-key-0123456789", "\u0660", "0x7f000001", "2130706433", "%", "/8"),
)
_KEYS = KeyRing(SecuritySettings(api_key="fuzz-key-0123456789"))
_PROXIES = ClientAddress(("127.0.0.0/8", "10.0.0.0/8", "::1"))


def headers(data: bytes) -> None:
    """What counts a client is an address or a network, and only the right key is accepted."""
    source = Source(data)
    port = source.byte() % 2 * 4711
    text = source.text(_HEADER)
    for peer in ("127.0.0.1", "203.0.113.9", text):
        address = _PROXIES.of((peer, port), {"x-forwarded-for": text})
        if address != "unknown":
            first = str(ipaddress.ip_network(address).network_address)
            assert _PROXIES.of((first, 1), {}) == address
    for name in ("x-api-key", "authorization"):
        try:
            _KEYS.authenticate({name: text})
        except InvalidAPIKeyError:
            continue
        assert text.strip().endswith("fuzz-key-0123456789")


# --- Files ----------------------------------------------------------------------------------------


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def gguf(data: bytes) -> None:
    """The header of any file is read, or raises ValueError."""
    path = Path(_folder().name) / "fuzz.gguf"
    # Half of the files get past the first check.
    path.write_bytes(data[1:] if data[:1] < b"\x80" else MAGIC + b"\x03\0\0\0" + data[1:])
    try:
        header = read_header(path)
    except ValueError:
        return
    assert header.end <= path.stat().st_size


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (pii, output, stops, tools, events, reading, requests, headers, gguf)
}
