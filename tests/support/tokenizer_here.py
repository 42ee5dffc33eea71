"""Reads a model's tokenizer in this process."""

from typing import Self

from app.core.config import ModelSettings
from app.llm.models.description import ModelShape, ModelTokenizer, read_shape, read_tokenizer
from app.llm.models.snapshot import Snapshot


class TokenizerHere:
    """Stands in for :class:`~app.llm.models.tokenizer_process.TokenizerProcess`.

    A process that imports transformers takes most of the time of loading a tiny model with
    OpenVINO.
    """

    def __init__(self, settings: ModelSettings, snapshot: Snapshot) -> None:
        self._source = settings, snapshot

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shape(self) -> ModelShape:
        """The model's shape."""
        return read_shape(*self._source)

    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer."""
        return read_tokenizer(*self._source)
