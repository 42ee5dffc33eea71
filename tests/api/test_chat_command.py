"""`llm-service chat`: a conversation at a terminal, driven as a person drives it."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT
from tests.support.service import Service, isolated_environment
from tests.support.terminal import Terminal, at_terminal

CHAT = (sys.executable, "-m", "app", "chat")


@contextmanager
def chatting(service: Service) -> Iterator[Terminal]:
    """The command at a terminal, once it waits for the first line."""
    environment = isolated_environment({"TERM": "dumb"})
    with at_terminal([*CHAT, "--url", service.base_url], environment) as terminal:
        terminal.expect("> ")
        yield terminal


def piped(lines: str, *options: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """The command without a terminal."""
    return subprocess.run(
        [*CHAT, *options],
        cwd=PROJECT_ROOT,
        env=isolated_environment(settings),
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_a_conversation(echo_service: Service) -> None:
    """Answers stream, and the commands change what the model is sent and show what was said."""
    with chatting(echo_service) as terminal:
        for line, shown in (
            ("first question", "first question\r\n\x1b[2m[15 tokens"),
            ("/system be brief", "> "),
            ("second question", "second question\r\n\x1b[2m[16 tokens"),
            ("/history", "user: first question\r\nassistant: first question\r\nuser: second"),
            ("/model", "echo\r\ndefault\r\n"),
            ("/model default", "> "),
            ("/new", "> "),
            ("/history", "> "),
            ("/what", "/quit         leave"),
        ):
            terminal.type(f"{line}\n")
            terminal.expect(f"{line}\r\n")
            terminal.expect(shown)
        terminal.type("/quit\n")
        assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_alone(slow_service: Service) -> None:
    """Ctrl-C frees the answer's slot; the program goes on, at its prompt too, until Ctrl-D."""
    with chatting(slow_service) as terminal:
        terminal.type("a long road " * 50 + "\n")
        slow_service.wait_for_metric("llm_requests_running", 1)
        terminal.type("\x03")
        terminal.expect("[stopped]")
        slow_service.wait_for_metric("llm_requests_running", 0)
        terminal.expect("> ")
        terminal.type("\x03")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_an_answer_cannot_control_the_terminal(echo_service: Service) -> None:
    """Without a terminal lines are questions and the output is answers, without escape codes."""
    done = piped("\x1b]0;title\x07red\n", "--url", echo_service.base_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "red\n" in done.stdout
    assert not {"\x1b", "\x07"} & {*done.stdout}


def test_errors_say_what_to_do(echo_service: Service) -> None:
    """A wrong key and an address where nothing listens are named in a line."""
    done = piped("hello\n", "--url", echo_service.base_url, SECURITY__API_KEY="wrong" * 10)
    assert "set SECURITY__API_KEY to a key of the service" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    done = piped("hello\n", "--url", address)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no service at {address}: " in done.stderr


def test_a_service_of_its_own() -> None:
    """Where none runs it starts the configured service, and leaves no process behind."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    done = piped("hello\n", APP__PORT=port, MARK_OF_THIS_TEST=port)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    left = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"MARK_OF_THIS_TEST={port}".encode() in path.read_bytes():
                left.append(path)
    assert not left


@pytest.mark.full_size
def test_a_service_of_its_own_that_cannot_start() -> None:
    """Why it cannot is the one line of the command."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    model = {"MODEL__ENGINE": "auto", "MODEL__SOURCE": "local", "MODEL__NAME": "/no/where"}
    done = piped("hello\n", APP__PORT=port, **model)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the service has ended: /no/where does not exist: " in done.stderr
