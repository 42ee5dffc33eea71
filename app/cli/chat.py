"""``llm-service chat``: a conversation with the model of a service, over plain HTTP."""

import contextlib
import json
import readline  # noqa: F401 - input() then edits lines, and recalls earlier ones in memory
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import httpx

from app.cli.service import harmless, own_service, wait_until_ready
from app.core.config import load_settings
from app.utils.errors import StartupError

_HELP = """\
/system TEXT  what the model is told first; without TEXT: nothing
/model NAME   another of the service's models; without NAME: list them
/history      the conversation so far
/new          forget the conversation
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""
# Answers may take long, and Ctrl-C ends the wait.
_TIMEOUT = httpx.Timeout(None, connect=5.0)


class _RefusedError(Exception):
    """The service refused a request, or ended its answer; the message says why."""


class Conversation:
    """A conversation that this process remembers and the service does not.

    Args:
        client: Has the service's address and the key.
        model: The model's name.
    """

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self._model = model
        self._system = ""
        self._messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Carry out a line that was typed; returns whether the conversation goes on.

        Raises:
            httpx.HTTPError: The service cannot be reached.
        """
        command, _, text = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        try:
            if command == "/system":
                self._system = text.strip()
            elif command == "/new":
                self._messages.clear()
            elif command == "/model":
                self._choose(text.strip())
            elif command == "/history":
                for message in self._messages:
                    print(f"{message['role']}: {harmless(message['content'])}")
            elif command.startswith("/"):
                print(_HELP)
            elif command:
                self._ask(line)
        except _RefusedError as error:
            print(harmless(str(error)), file=sys.stderr)
        return True

    def _choose(self, name: str) -> None:
        response = self._client.get("/v1/models")
        _check(response)
        names = [str(model["id"]) for model in response.json()["data"]]
        if name in names:
            self._model = name
        else:
            print(*map(harmless, names), sep="\n")

    def _ask(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {
            "model": self._model,
            "messages": [*system, *asked],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer, tokens, started, stopped = "", 0, time.monotonic(), False
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                for event in _events(response):
                    answer += _print(event)
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        except KeyboardInterrupt:
            # Leaving the stream has closed the connection, which stops the engine.
            stopped = True
        finally:
            print(flush=True)
        if answer:
            # What came before a stop is remembered.
            self._messages = [*asked, {"role": "assistant", "content": answer}]
        if stopped:
            _remark("[stopped]")
        elif tokens:
            seconds = time.monotonic() - started
            _remark(f"[{tokens} tokens, {tokens / seconds:.1f} a second]")


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    _check(response)
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise _RefusedError(event["error"]["message"])
            yield event


def _print(event: dict[str, Any]) -> str:
    """Print what an event adds to the answer; returns it, without reasoning."""
    text = ""
    for choice in event["choices"]:
        delta = choice["delta"]
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            _remark(harmless(reasoning), end="")
        text += delta.get("content") or ""
    print(harmless(text), end="", flush=True)
    return text


def _remark(text: str, end: str = "\n") -> None:
    """Print what is not the answer: dimmed at a terminal, and not at all elsewhere."""
    if sys.stdout.isatty():
        print(f"\033[2m{text}\033[0m", end=end, flush=True)


def _check(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.OK:
        return
    response.read()
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):
        message = f"the service answered {response.status_code}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += ": set SECURITY__API_KEY to a key of the service"
    if wait := response.headers.get("Retry-After"):
        message += f" (try again in {wait} s)"
    raise _RefusedError(message)


def chat(url: str | None) -> int:
    """Talk to the service at ``url``, by default the configured one; returns the exit status.

    Where none runs at the configured address, one is started, and stopped in the end.

    Raises:
        StartupError: There is no service, and none can be started.
    """
    # An exception ends a service of our own in order.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    settings = load_settings()
    here = f"http://127.0.0.1:{settings.app.port}"
    key = settings.security.api_key.get_secret_value()
    try:
        with contextlib.ExitStack() as stack:
            process = None
            if url is None and not _listens(here):
                url, process = stack.enter_context(own_service())
            client = stack.enter_context(
                httpx.Client(
                    base_url=url or here,
                    headers={"Authorization": f"Bearer {key}"},
                    timeout=_TIMEOUT,
                    # A proxy of the environment may not reach this machine.
                    trust_env=url is not None and process is None,
                )
            )
            if (model := wait_until_ready(client, process)) is not None:
                _talk(client, model)
    except KeyboardInterrupt:
        return 130
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(f"there is no service at {url or here}: {error}") from None
    return 0


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=_TIMEOUT, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def _talk(client: httpx.Client, model: str) -> None:
    """Read lines until the end of standard input or ``/quit``; one line is one turn."""
    conversation = Conversation(client, model)
    _remark(f"{harmless(model)} at {client.base_url}; /help lists the commands")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
            # What is no UTF-8 cannot be sent.
            if not conversation.take(line.encode(errors="replace").decode()):
                return
        except KeyboardInterrupt:
            print()
        except EOFError:
            return
