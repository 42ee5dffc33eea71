"""The tokenizer of a GGUF file, which transformers converts; slow conversions are kept.

A vocabulary without merges, as Gemma's, takes up to half a minute of processor time to convert.
"""

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from app.core.logging import get_logger
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.load_errors import is_failure, one_line

log = get_logger("engine")

TOKENS: Final = "tokenizer.ggml.tokens"
"""The key of the vocabulary."""

KEEP_FROM_SECONDS = 1.0
"""Least processor time of a conversion that is kept. Reading a kept one takes up to a second."""

_END_KEY = re.compile(r"tokenizer\.ggml\.(?:eos|eot|eom)_token_ids?")
# Tokens that end a turn although no key names them; llama.cpp ends answers at the same spellings.
_ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<EOT>",
    "<|EOT|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
# The specification's number of the kind of token that is not text.
_CONTROL = 3


def end_token_ids(header: GgufHeader) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    tokens = header.metadata.get(TOKENS, [])
    kinds = header.metadata.get("tokenizer.ggml.token_type", [])
    pairs = enumerate(zip(tokens, kinds, strict=False))
    ids = {i for i, (token, kind) in pairs if kind == _CONTROL and token in _ENDS}
    for key, value in header.metadata.items():
        if _END_KEY.fullmatch(key):
            ids |= set(value if isinstance(value, list) else [value])
    # -1, and other numbers that are no token, mean that there is none.
    return frozenset(ids & set(range(len(tokens))))


def load_gguf_tokenizer(header: GgufHeader) -> Any:
    """The tokenizer as an object of transformers.

    Raises what transformers and tokenizers raise.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    with _metadata_from(header):
        architecture, vocabulary, config = get_gguf_tokenizer("")
    kept = _kept_file(header, architecture)
    if kept.is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(kept), **config)
        except BaseException as error:
            if not is_failure(error):
                raise
            log.warning("%s is not used: %s", kept, one_line(error))
    begun = time.process_time()
    backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    if time.process_time() - begun > KEEP_FROM_SECONDS:
        _keep(backend.to_str(), kept)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **config)


@contextmanager
def _metadata_from(header: GgufHeader) -> Iterator[None]:
    """Let transformers take the tokenizer's metadata from a header.

    Its own reader takes seconds for a large vocabulary, and imports torch.
    """
    reader = vars(import_module("transformers.integrations.gguf.reader"))
    original = reader.get("read_gguf_metadata")
    reader["read_gguf_metadata"] = lambda *_: (dict(header.metadata), ())
    try:
        yield
    finally:
        reader["read_gguf_metadata"] = original


def _kept_file(header: GgufHeader, architecture: str) -> Path:
    import transformers
    from huggingface_hub import constants

    # Another version may convert differently.
    made_of = f"{header.tokenizer_digest} {architecture} {transformers.__version__}"
    name = hashlib.sha256(made_of.encode()).hexdigest()
    return Path(constants.HF_HOME, "gguf-tokenizers", f"{name}.json")


def _keep(tokenizer: str, path: Path) -> None:
    """Write a conversion under its name at once, so that another start finds a whole file.

    A folder that cannot be written means that each start converts.
    """
    unfinished = path.with_name(f"{secrets.token_hex(8)}.unfinished")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(tokenizer, encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
