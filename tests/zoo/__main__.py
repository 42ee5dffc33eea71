"""``make models``: every architecture of transformers, tiny and random, on each engine.

Each is made, loaded as the service loads it, and asked prompts alone and together, past a window
and up to the end of the context; its greedy tokens are compared with ``model.generate``. The list
goes into docs/models.md. The exit status is 1 if an answer is wrong, or an engine crashes or hangs.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Final

import torch
from transformers import logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from app.core.config import PROJECT_ROOT, ModelSettings
from app.llm.client.process import VLLM_PYTHON
from app.llm.engine.openvino.conversion import convert
from app.llm.engine.transformers.backend import TransformersBackend
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError
from benchmarks.page import replace_section
from tests.support import backends
from tests.zoo import check, gguf_file, tiny

GGUF: Final = ".gguf"
"""Ends the names of models that OpenVINO reads from a GGUF file."""

CONVERTED: Final = ".openvino"
"""Ends the names of models that are converted for OpenVINO."""

PAGE: Final = PROJECT_ROOT / "docs" / "models.md"
WIDTH: Final = 108
"""Characters of a line of the page."""

MAX_RUNNING: Final = 8
TIMEOUT: Final = 600
"""Seconds that one architecture may take."""

FORK: Final = multiprocessing.get_context("fork")
"""Children have torch and transformers imported already; a crash costs one row."""


@dataclass(frozen=True, order=True)
class Row:
    """What became of an architecture.

    Attributes:
        outcome: The path that runs it (``paged``, ``plain``, ``openvino``), ``refused``,
            ``not built``, ``WRONG`` or ``CRASHED``.
        reason: Why, without what differs from one architecture to the next.
        kind: The ``model_type``.
    """

    outcome: str
    reason: str
    kind: str


def examine(kind: str, engine: str, folder: Path) -> Row:
    """Make an architecture's model, load it and compare its answers; OpenVINO gets its formats."""
    path = folder
    try:
        tiny.make(kind.removesuffix(GGUF).removesuffix(CONVERTED), folder)
        if kind.endswith(GGUF):
            path = gguf_file.write(folder)
        reference = check.Reference(folder)
        reference.answer(check.prompts(1)[-1])
    except Exception as error:  # noqa: BLE001 - transformers raises anything
        return Row("not built", _short(f"{type(error).__name__}: {error}"), kind)
    settings = ModelSettings(source="local", name=str(path), engine=engine, dtype="float32")
    if kind.endswith(CONVERTED):
        path = folder / "converted"
        try:
            convert(settings, Snapshot(folder, None), path, lambda *_: None)
        except Exception as error:  # noqa: BLE001 - the service runs it with transformers then
            return Row("refused", _short(str(error)), kind)
        settings = settings.model_copy(update={"name": str(path)})
    try:
        backend = backends.load(settings, max_running=MAX_RUNNING)
    except ModelLoadError as error:
        return Row("refused", _short(str(error).replace(str(folder), "it")), kind)
    if found := check.faults(backend, reference):
        return Row("WRONG", "; ".join(found), kind)
    name = type(backend).__name__.removesuffix("Backend").lower()
    outcome = "paged" if isinstance(backend, TransformersBackend) else name
    return Row(outcome, _short(backend.info.backend_reason), kind)


def _short(reason: str) -> str:
    """A reason by which architectures can be put together."""
    line = " ".join(reason.split())
    # The engine was asked for, and what to do comes after the colon.
    line = re.sub(r"^model\.engine is \w+(, (and|but) |; |$)", "", line)
    # That is what the plain path is.
    line = line.removeprefix("each request has a cache of its own, since ")
    inner = re.search(r"\((.*)\)", line)
    line = re.sub(r"(Invalid layer type): .*", r"\1", inner[1] if inner else line)
    return textwrap.shorten(line, 70, placeholder=" …").replace("|", "/")


def _child(kind: str, engine: str, folder: Path, answer: Connection) -> None:
    answer.send(examine(kind, engine, folder))
    # The parent's libraries are not to be torn down twice.
    os._exit(0)


def run(kinds: Iterable[str], engine: str, folder: Path) -> Iterator[Row]:
    """Examine architectures in child processes, as many at once as there are processors."""
    left = list(kinds)[::-1]
    running: dict[Connection, tuple[str, ForkProcess, float]] = {}
    while left or running:
        while left and len(running) < (os.cpu_count() or 1):
            kind = left.pop()
            ours, theirs = FORK.Pipe(duplex=False)
            child = FORK.Process(target=_child, args=(kind, engine, folder / kind, theirs))
            child.start()
            theirs.close()
            running[ours] = kind, child, time.monotonic()
        ready = wait([*running], timeout=1)
        for answer, (kind, child, started) in [*running.items()]:
            if answer not in ready and time.monotonic() - started < TIMEOUT:
                continue
            try:
                row = answer.recv() if answer in ready else Row("CRASHED", "timeout", kind)
            except EOFError:
                child.join()
                row = Row("CRASHED", f"exit status {child.exitcode}", kind)
            child.kill()
            child.join()
            answer.close()
            del running[answer]
            shutil.rmtree(folder / kind, ignore_errors=True)
            yield row


_REASONS: Final = {
    "WRONG": "other tokens than `generate()`",
    "not built": "no small one that generates can be made",
}
"""Reasons on the page where the true ones differ for each architecture."""


def vllm_kinds() -> frozenset[str]:
    """The model types whose class vLLM has in its registry; none where vLLM is not installed."""
    if not VLLM_PYTHON.exists():
        return frozenset()
    program = "from vllm import ModelRegistry; print(*ModelRegistry.get_supported_archs())"
    done = subprocess.run(
        [VLLM_PYTHON, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    classes = set(done.stdout.splitlines()[-1].split())
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    kinds = {kind for kind, name in known if name in classes}
    return frozenset({*kinds, *(v for v in tiny.VARIANTS if v.partition("-")[0] in kinds)})


def render(rows: Iterable[Row], vllm: frozenset[str] = frozenset()) -> str:
    """The list of the page: an entry for each outcome and reason; what vLLM has gets a star."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in sorted(rows):
        reason = _REASONS.get(row.outcome, row.reason)
        name = f"{row.kind}*" if row.kind in vllm else row.kind
        groups.setdefault((row.outcome, reason), []).append(name)
    order = ["paged", "plain", "openvino", "vllm", "refused", *_REASONS, "CRASHED"]
    entries = []
    for (outcome, reason), kinds in sorted(
        groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1]))
    ):
        why = f" ({reason})" if reason else ""
        names = ", ".join(sorted(kind.removesuffix(CONVERTED) for kind in kinds))
        text = f"- **{outcome}, {len(kinds)}**{why}: {names}"
        entries.append(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(entries)


def main() -> int:
    """Examine them, write the page, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; default: all, into the page")
    parser.add_argument("--engine", default="transformers")
    options = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # A child would wait forever for the threads that the parent had.
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = options.kinds or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *tiny.VARIANTS]
        more = [f"{kind}{GGUF}" for kind in gguf_file.KINDS] + [f"{k}{CONVERTED}" for k in kinds]
        more = [] if options.kinds else more
        for row in itertools.chain(
            run(kinds, options.engine, Path(folder)), run(more, "openvino", Path(folder))
        ):
            sys.stdout.write(f"{row.kind}: {row.outcome}. {row.reason}\n")
            sys.stdout.flush()
            # A model that is not converted is in the list by what runs it instead.
            if row.outcome not in {"refused", "not built"} or not row.kind.endswith(CONVERTED):
                rows.append(row)
    bad = [row for row in rows if row.outcome in {"WRONG", "CRASHED"}]
    if bad:
        names = ", ".join(row.kind for row in bad)
        sys.stdout.write(f"{len(bad)} of {len(rows)} are not right: {names}\n")
    if not options.kinds:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            replace_section(text, "models", render(rows, vllm_kinds())), encoding="utf-8"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
