"""``python -m app``: the same as ``llm-service``, see :mod:`app.cli`."""

import os
import signal
import sys
from types import FrameType


def _exit(number: int, _frame: FrameType | None) -> None:
    # An exception would be turned into another one where it comes while a class is made.
    os._exit(128 + number)


# Until uvicorn handles them. Python would print a traceback, and the first process of a container
# would not end at all. The imports below take most of that time.
signal.signal(signal.SIGINT, _exit)
signal.signal(signal.SIGTERM, _exit)

from app.cli import main  # noqa: E402 - see above

sys.exit(main())
