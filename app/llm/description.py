"""What a model's files say beside its weights: its tokenizer and its configuration.

transformers is imported inside the functions that need it, because an engine process that runs
OpenVINO calls none of them: there :mod:`app.llm.tokenizer_process` does.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.core.config import ModelSettings
from app.llm.byte_level import BYTE_OF
from app.llm.gguf_header import GgufHeader, read_header
from app.llm.load_errors import explaining
from app.llm.snapshot import OPENVINO_MODEL, Snapshot

_GGUF_TOKENS = "tokenizer.ggml.tokens"


class UnknownShapeError(Exception):
    """A model's files are whole, but do not say in a known way what shape it has."""


class ModelShape(msgspec.Struct, frozen=True, tag=True):
    """What a model's configuration says.

    Attributes:
        context_length: Most tokens of prompt and answer together.
        vocabulary_size: Tokens the model has embeddings for.
        cache_values_per_token: Numbers in the KV cache for one token, over all layers.
        weights: How the weights are stored, such as ``q4_1``.
    """

    context_length: int
    vocabulary_size: int
    cache_values_per_token: int
    weights: str


class ModelTokenizer(msgspec.Struct, frozen=True, tag=True):
    """A model's tokenizer.

    Attributes:
        tokenizer_json: As the ``tokenizers`` library serialises it.
        chat_template: Jinja; ``None`` where there is none.
        special_tokens: ``bos_token``, ``eos_token`` and the like.
        eos_token_ids: Tokens that end an answer.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]


class Vocabulary(msgspec.Struct, frozen=True):
    """What tokens stand for.

    Attributes:
        tokens: Of each token, by its id.
        eos: Token that ends an answer, if there is one.
    """

    tokens: Sequence[bytes]
    eos: int | None


def read_gguf(settings: ModelSettings, snapshot: Snapshot) -> GgufHeader:
    """What a GGUF file says of itself; it takes no library, and so no process of its own.

    Raises:
        ModelLoadError: It is no GGUF file, or cut off.
    """
    with explaining("file", settings, snapshot):
        return read_header(snapshot.directory / str(snapshot.gguf), (_GGUF_TOKENS,))


def read_shape(settings: ModelSettings, snapshot: Snapshot) -> ModelShape:
    """Read the configuration of a model in OpenVINO's own format.

    Raises:
        ModelLoadError: It cannot be read.
    """
    from transformers import AutoConfig

    with explaining("configuration", settings, snapshot):
        # A folder is read that is here already, see pretrained_source.
        config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
        return ModelShape(
            context_length=context_length(config),
            vocabulary_size=int(config.get_text_config().vocab_size),
            cache_values_per_token=cache_values_per_token(config),
            weights=_compression(snapshot.directory),
        )


def gguf_shape(header: GgufHeader) -> ModelShape:
    """What the keys of a GGUF file's header mean, by the names its specification gives.

    Raises:
        UnknownShapeError: One is missing, or is no number, such as a list with one for each layer.
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
    """The vocabulary of a GGUF file, if it is of byte-level BPE."""
    tokens = header.metadata.get(_GGUF_TOKENS)
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(tokens, list):
        return None
    return Vocabulary(
        # A special token may have characters that stand for no byte, and stands for them then.
        tokens=[
            bytes(map(BYTE_OF.__getitem__, token))
            if BYTE_OF.keys() >= set(token)
            else token.encode()
            for token in tokens
        ],
        eos=header.metadata.get("tokenizer.ggml.eos_token_id"),
    )


def _gguf_weights(kind: Any) -> str:
    """How the weights are stored; kinds newer than the library have no name yet."""
    import gguf

    try:
        name = gguf.LlamaFileType(kind).name
    except ValueError:
        return "gguf"
    return str(name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def read_tokenizer(settings: ModelSettings, snapshot: Snapshot) -> ModelTokenizer:
    """Read a model's tokenizer, and which tokens end an answer.

    Raises:
        ModelLoadError: It cannot be read.
    """
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(settings, snapshot)
    generation = GenerationConfig()
    if (snapshot.directory / "generation_config.json").is_file() and not snapshot.gguf:
        with explaining("configuration", settings, snapshot):
            generation = GenerationConfig.from_pretrained(snapshot.directory)  # nosec B615
    return ModelTokenizer(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=chat_template(tokenizer),
        special_tokens=special_tokens(tokenizer),
        eos_token_ids=eos_token_ids(generation, tokenizer),
    )


def pretrained_source(snapshot: Snapshot) -> dict[str, Any]:
    """Arguments with which transformers finds a snapshot's files, and nothing else."""
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    return source | ({"gguf_file": snapshot.gguf} if snapshot.gguf else {})


def load_tokenizer(settings: ModelSettings, snapshot: Snapshot) -> Any:
    """The model's tokenizer, as transformers has it.

    Raises:
        ModelLoadError: It cannot be read, or not be run by the ``tokenizers`` library.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Of a GGUF file AutoTokenizer makes the same, but parses the whole file twice to get there.
    kind = PreTrainedTokenizerFast if snapshot.gguf else AutoTokenizer
    with explaining("tokenizer", settings, snapshot):
        tokenizer = kind.from_pretrained(snapshot.directory, **pretrained_source(snapshot))
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not len(tokenizer):
            raise ValueError("it is none that the tokenizers library can run")
        return tokenizer


def chat_template(tokenizer: Any) -> str | None:
    """The template for plain conversations; some models have more, for tools and the like."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, for the template."""
    tokens = tokenizer.special_tokens_map.items()
    return {key: value for key, value in tokens if isinstance(value, str)}


def eos_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's own."""
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together, from a model's configuration."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else 2048


def cache_values_per_token(config: Any) -> int:
    """Numbers that the KV cache holds for one token: a key and a value for each head and layer."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim)


def _compression(directory: Path) -> str:
    """How a model in OpenVINO's own format was compressed, as its exporter noted it."""
    xml = (directory / OPENVINO_MODEL).read_text(encoding="utf-8")
    noted = re.search(r'<weight_compression>.*?<mode value="(\w+)"', xml, re.DOTALL)
    return noted[1].lower() if noted else "uncompressed"
