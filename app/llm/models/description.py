"""Reads a model's tokenizer and configuration.

A file that cannot be read raises :class:`ModelLoadError`. transformers is imported inside
functions, because an engine process that runs OpenVINO does without it.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from app.core.config import ModelSettings
from app.llm.models.byte_level import (
    decoder_kinds,
    spell_byte_level,
    spell_piece,
    token_bytes,
)
from app.llm.models.files import MAX_SIZE
from app.llm.models.gguf_header import GgufHeader, read_header
from app.llm.models.gguf_tokenizer import TOKENS, end_token_ids, load_gguf_tokenizer
from app.llm.models.load_errors import explaining, is_failure
from app.llm.models.snapshot import OPENVINO_MODEL, Snapshot


class UnknownShapeError(Exception):
    """The model's files are whole, but do not give its shape in a known form."""


class ModelShape(msgspec.Struct, frozen=True, tag=True):
    """The shape of a model; see :class:`~app.llm.protocol.EngineInfo`.

    ``cache_values_per_token`` counts the numbers that the KV cache holds for one token, over all
    layers. ``weights`` is the storage format, such as ``q4_1``.
    """

    context_length: int
    vocabulary_size: int
    cache_values_per_token: int
    weights: str


class ModelTokenizer(msgspec.Struct, frozen=True, tag=True):
    """A model's tokenizer; see :class:`~app.llm.protocol.EngineInfo`.

    ``eos_token_ids`` are the tokens that end an answer.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]


class Vocabulary(msgspec.Struct, frozen=True):
    """The bytes of each token, by its id; ``eos`` is the token that ends an answer, if known."""

    tokens: Sequence[bytes]
    eos: int | None


def read_gguf(settings: ModelSettings, snapshot: Snapshot) -> GgufHeader:
    """Read the header of a GGUF file, and refuse sizes that its tensors cannot have."""
    with explaining("file", settings, snapshot):
        header = read_header(snapshot.directory / str(snapshot.gguf))
        if (parts := header.metadata.get("split.count", 1)) != 1:
            raise ValueError(f"it is one of {parts} parts, which llama-gguf-split --merge joins")
        architecture = f"{header.metadata.get('general.architecture')}."
        for key, value in header.metadata.items():
            # Each layer has a tensor. The context is compared with the memory later.
            most = len(header.shapes) if key.endswith(".block_count") else MAX_SIZE
            is_size = key.startswith(architecture) and not key.endswith("context_length")
            if is_size and type(value) is int and value > most:
                raise ValueError(f"its {key} is {value}, and at most {most} is possible")
        return header


def read_shape(settings: ModelSettings, snapshot: Snapshot) -> ModelShape:
    """Read the shape of a model in OpenVINO's own format from its configuration."""
    from transformers import AutoConfig

    with explaining("configuration", settings, snapshot):
        # Nothing is downloaded: see pretrained_source.
        config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
        return ModelShape(
            context_length=context_length(config),
            vocabulary_size=int(config.get_text_config().vocab_size),
            cache_values_per_token=cache_values_per_token(config),
            weights=_compression(snapshot.directory),
        )


def gguf_shape(header: GgufHeader) -> ModelShape:
    """The shape of a model from its GGUF header, whose keys the GGUF specification names.

    Raises:
        UnknownShapeError: A key is missing or is no number, such as a list with a number per layer.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise UnknownShapeError("its metadata have no general.architecture")

    def number(name: str, default: int | None = None) -> int:
        key = f"{architecture}.{name}"
        value = header.metadata.get(key, 0)
        if value == 0 and default:
            return default
        if type(value) is not int or value < 1:
            raise UnknownShapeError(f"its metadata have no number {key}")
        return value

    embeddings = header.shapes.get("token_embd.weight")
    if not embeddings:
        raise UnknownShapeError("it has no tensor token_embd.weight")
    heads = number("attention.head_count")
    shared = number("attention.head_count_kv", heads)
    head_dim = number("attention.key_length", number("embedding_length") // heads)
    return ModelShape(
        context_length=number("context_length"),
        vocabulary_size=embeddings[0],
        cache_values_per_token=2 * number("block_count") * shared * head_dim,
        weights=_gguf_weights(header.metadata.get("general.file_type")),
    )


def gguf_vocabulary(header: GgufHeader) -> Vocabulary | None:
    """The vocabulary of a GGUF file; ``None`` if it is neither byte-level BPE nor SentencePiece."""
    tokens = header.metadata.get(TOKENS)
    spell = _SPELL.get(str(header.metadata.get("tokenizer.ggml.model")))
    if spell is None or not isinstance(tokens, list):
        return None
    return Vocabulary(list(map(spell, tokens)), header.metadata.get("tokenizer.ggml.eos_token_id"))


def json_vocabulary(file: Path, size: int) -> Vocabulary | None:
    """``size`` tokens of a ``tokenizer.json``; an id that it lacks has no bytes.

    ``None`` if there is none that is byte-level BPE or SentencePiece.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:
        if not is_failure(error):
            raise
        # The process that reads the tokenizer tells what is wrong with the file.
        return None
    if not decoder_kinds(tokenizer) & {"ByteLevel", "ByteFallback", "Metaspace"}:
        return None
    return Vocabulary(list(map(token_bytes(tokenizer), range(size))), None)


_SPELL = {"gpt2": spell_byte_level, "llama": spell_piece}


def _gguf_weights(kind: Any) -> str:
    import gguf

    try:
        name = gguf.LlamaFileType(kind).name
    except ValueError:
        # The type is newer than the library.
        return "gguf"
    return str(name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def read_tokenizer(settings: ModelSettings, snapshot: Snapshot) -> ModelTokenizer:
    """Read a model's tokenizer and the ids of the tokens that end an answer."""
    if snapshot.gguf:
        header = read_gguf(settings, snapshot)
        tokenizer, ends = load_tokenizer(settings, snapshot, header), end_token_ids(header)
    else:
        tokenizer = load_tokenizer(settings, snapshot)
        with explaining("configuration", settings, snapshot):
            ends = eos_token_ids(_generation_config(snapshot), tokenizer)
    return ModelTokenizer(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=chat_template(tokenizer),
        special_tokens=special_tokens(tokenizer),
        eos_token_ids=ends,
    )


def _generation_config(snapshot: Snapshot) -> Any:
    """As transformers takes it for a model: from its own file, else from the configuration."""
    from transformers import AutoConfig, GenerationConfig

    if (snapshot.directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(snapshot.directory)  # nosec B615
    config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
    return GenerationConfig.from_model_config(config)


def pretrained_source(snapshot: Snapshot) -> dict[str, Any]:
    """Arguments that make transformers read a snapshot's files, and download or run nothing."""
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    return source | ({"gguf_file": snapshot.gguf} if snapshot.gguf else {})


def load_tokenizer(
    settings: ModelSettings, snapshot: Snapshot, header: GgufHeader | None = None
) -> Any:
    """Load the model's tokenizer as an object of transformers, and try its chat template.

    ``header`` is that of a GGUF file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with explaining("tokenizer", settings, snapshot):
        if header is not None:
            tokenizer = load_gguf_tokenizer(header)
        else:
            # The folder is local, see pretrained_source.
            tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
                snapshot.directory, **pretrained_source(snapshot)
            )
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not len(tokenizer):
            raise ValueError("it is none that the tokenizers library can run")
    from app.llm.models.chat_template import check_chat_template, read_chat_template

    if settings.chat_template is not None:
        tokenizer.chat_template = read_chat_template(settings.chat_template)
    if (template := chat_template(tokenizer)) is not None:
        check_chat_template(template, special_tokens(tokenizer), settings.label)
    return tokenizer


def chat_template(tokenizer: Any) -> str | None:
    """The default chat template; some models have others beside it, for tools for example."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Texts of ``bos_token``, ``eos_token`` and the like, which chat templates use."""
    tokens = tokenizer.special_tokens_map.items()
    return {key: value for key, value in tokens if isinstance(value, str)}


def eos_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer, by the generation config and by the tokenizer."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def context_length(config: Any) -> int:
    """Maximum number of tokens in prompt and answer together; 2048 if ``config`` names none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet's is -1.
    return int(length) if length and length > 0 else 2048


def cache_values_per_token(config: Any) -> int:
    """Numbers that the KV cache holds for one token: a key and a value per head and layer."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim)


def _compression(directory: Path) -> str:
    """Compression of a model in OpenVINO's own format, as its exporter recorded it."""
    xml = (directory / OPENVINO_MODEL).read_text(encoding="utf-8")
    noted = re.search(r'<weight_compression>.*?<mode value="(\w+)"', xml, re.DOTALL)
    return noted[1].lower() if noted else "uncompressed"


def fixed_rope_limit(config: Any) -> float:
    """Length up to which the rotary embedding does not depend on the longest text of a batch.

    The kind ``longrope`` depends on it. So does ``dynamic``, but only beyond the context length.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # There is one set of parameters, or one for each kind of layer.
    sets = [entry for entry in (parameters, *parameters.values()) if isinstance(entry, dict)]
    limits = [
        s["original_max_position_embeddings"] for s in sets if s.get("rope_type") == "longrope"
    ]
    return min(limits, default=math.inf)
