"""Fetch the bundled model, showing the progress: `make model`, or `python -m scripts.fetch_model`.

Does nothing, and needs no network, when the model is here already.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

from app.llm.bundled import BUNDLED, FetchError, bundled_model_path, fetch, is_fetched

_BAR_CELLS = 30
_REDRAW_SECONDS = 0.1
_LINE_PERCENT = 10


class ProgressBar:
    """Shows a download: one line redrawn on a terminal, a line every ten percent elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._redraws = stream.isatty()
        self._drawn_at = 0.0
        self._next_percent = 0
        self._started_at: float | None = None
        self._first_bytes = 0

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` bytes."""
        now = time.monotonic()
        if self._started_at is None:
            # A resumed download starts with bytes that say nothing about today's speed.
            self._started_at, self._first_bytes = now, done
        percent = 100 * done // total
        text = f"{percent:3d} %  {done / 1e6:5.1f} of {total / 1e6:.1f} MB{self._speed(done, now)}"
        if not self._redraws:
            if percent >= self._next_percent:
                self._next_percent = percent - percent % _LINE_PERCENT + _LINE_PERCENT
                print(f"  {text}", file=self._stream, flush=True)
        elif done >= total or now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            full = _BAR_CELLS * done // total
            bar = "#" * full + "-" * (_BAR_CELLS - full)
            end = "\n" if done >= total else ""
            # The trailing blanks wipe what a longer earlier line left on the terminal.
            print(f"\r  [{bar}] {text}    ", end=end, file=self._stream, flush=True)

    def _speed(self, done: int, now: float) -> str:
        seconds = now - (self._started_at or now)
        fresh = done - self._first_bytes
        return f"  {fresh / seconds / 1e6:.1f} MB/s" if seconds > 0 and fresh > 0 else ""


def fetch_with_progress(stream: TextIO = sys.stderr) -> Path:
    """Fetch the bundled model, telling on `stream` what happens.

    Raises:
        FetchError: the model could not be fetched; the message says what to do.
    """
    if is_fetched():
        print(f"The bundled model is here: {bundled_model_path()}", file=stream)
        return bundled_model_path()
    print(f"Fetching the bundled model: {BUNDLED.filename}", file=stream, flush=True)
    path = fetch(ProgressBar(stream))
    print(f"Checked its SHA-256 and kept it: {path}", file=stream)
    return path


def main() -> int:
    """Fetch, and return the exit status."""
    try:
        fetch_with_progress()
    except FetchError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
