"""A program at a terminal of its own, which a test types into and reads."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from app.core.config import PROJECT_ROOT

# The opening makes the terminal that of the new session, so that Ctrl-C is a signal.
_AT_TERMINAL = 'exec 0<>"$0" 1>&0 2>&0; exec "$@"'


class Terminal:
    """The test's end of a terminal.

    Attributes:
        text: All that was shown so far.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self.text = ""
        self._descriptor = descriptor
        self._seen = 0

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode())

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """Wait for a text after the last one that was waited for; returns what is before it."""
        started = time.monotonic()
        while (at := self.text.find(text, self._seen)) < 0:
            assert time.monotonic() - started < seconds, f"no {text!r} in {self.text!r}"
            assert self._read() or self.process.poll() is None, f"the end came: {self.text!r}"
        before = self.text[self._seen : at]
        self._seen = at + len(text)
        return before

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the program's end; returns its exit status."""
        started = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() - started < seconds, f"it goes on: {self.text!r}"
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> bool:
        """Read what is shown within a moment; returns whether anything was."""
        if not select.select([self._descriptor], [], [], 0.1)[0]:
            return False
        self.text += os.read(self._descriptor, 65_536).decode(errors="replace")
        return True


@contextmanager
def at_terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program at a terminal of its own, and kill it at the end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["sh", "-c", _AT_TERMINAL, os.ttyname(theirs), *command],
        cwd=PROJECT_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)
