"""Small programs that keep a core busy, in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "print(flush=True)\nwhile True: pass"
# Only on the first core, on Linux.
PINNED = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
# And only while nothing else wants that core.
STARVED = f"{PINNED}os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"


def with_child(program: str) -> str:
    """A program that starts this one and waits for it."""
    return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"


@contextmanager
def running(program: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that has written a line; it is killed at the end, with its children."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # In this session: the kernel first shares its processors out between sessions.
        process_group=0,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
