"""Reports the tensors that transformers has read, for which it would draw a bar."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from app.llm.models.progress import Progress, counted


@contextmanager
def counting_tensors(what: str, progress: Progress) -> Iterator[None]:
    """Call ``progress`` with ``what`` and the share of the tensors that a model has so far."""

    def report(bar: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if arguments and isinstance(arguments[0], Collection):
            return counted(arguments[0], what, progress)
        return bar(*arguments, **options)

    before = logging.set_tqdm_hook(report)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
