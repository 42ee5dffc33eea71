"""What there is to know of a model beside its weights: its tokenizer and its configuration.

transformers reads every tokenizer there is, but takes half a second and 100 MB that a process which
computes with OpenVINO can spare. So there it runs in a process of its own beside the loading of the
weights, ``python -m app.llm.description``, which answers with lines of JSON and leaves.
"""

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Self, TypeVar

import msgspec

from app.core.config import ModelSettings
from app.llm.byte_level import BYTE_OF
from app.llm.gguf_header import GgufHeader, read_header
from app.llm.load_errors import explaining
from app.llm.snapshot import OPENVINO_MODEL, Snapshot
from app.utils.errors import ModelLoadError

_GGUF_TOKENS = "tokenizer.ggml.tokens"
_NICE = 10


class UnknownShapeError(Exception):
    """A model's files are whole, but do not say in a known way what shape it has."""


class ModelShape(msgspec.Struct, frozen=True):
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


class ModelTokenizer(msgspec.Struct, frozen=True):
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


class _Failure(msgspec.Struct, frozen=True, tag=True):
    message: str


class _Shape(msgspec.Struct, frozen=True, tag=True):
    shape: ModelShape


class _Tokenizer(msgspec.Struct, frozen=True, tag=True):
    tokenizer: ModelTokenizer


_Answer = _Failure | _Shape | _Tokenizer
T = TypeVar("T", _Shape, _Tokenizer)


class DescriptionProcess:
    """A description that is being read; the reading ends with the block."""

    def __init__(self, settings: ModelSettings, snapshot: Snapshot) -> None:
        """Start reading."""
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "app.llm.description",
                settings.model_dump_json(),
                str(snapshot.directory),
                snapshot.weights or "",
            ],
            # The process ends when this pipe does, and so with the engine, whatever ends that.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def shape(self) -> ModelShape:
        """Wait for what the configuration says; asked for first.

        Raises:
            ModelLoadError: It cannot be read, or the weights are cut off.
        """
        return self._read(_Shape).shape

    def tokenizer(self) -> ModelTokenizer:
        """Wait for the tokenizer; asked for last.

        Raises:
            ModelLoadError: It cannot be read.
        """
        return self._read(_Tokenizer).tokenizer

    def _read(self, kind: type[T]) -> T:
        output: IO[bytes] | None = self._process.stdout
        line = output.readline() if output else b""
        if not line:
            raise ModelLoadError(
                f"reading the model's tokenizer ended with code {self._process.wait()}: start "
                "again; if it stays, set MODEL__ENGINE=transformers"
            )
        answer = msgspec.json.decode(line, type=_Answer)
        if isinstance(answer, _Failure):
            raise ModelLoadError(answer.message)
        if not isinstance(answer, kind):
            raise TypeError(f"{answer!r} is out of turn")
        return answer


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


def _keep_torch_out() -> None:
    """Have transformers find no torch, which takes another second and a half and 200 MB.

    It says once that models cannot be run without, which is not news here. Its reader of GGUF files
    needs torch for weights only, so the reader of headers stands in for it.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    reader = ModuleType("reader")
    reader.__dict__["read_gguf_metadata"] = _gguf_metadata
    sys.modules["transformers.integrations.gguf.reader"] = reader


def _gguf_metadata(path: str, _: object = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metadata and names of tensors, as transformers' own function returns them."""
    header = read_header(Path(path), ("tokenizer.",))
    return dict(header.metadata), tuple(header.shapes)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Entry point; see the module's docstring."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The weights take longer, and are being loaded on one core.
    os.nice(_NICE)
    # Imports and a vocabulary make many objects, and the process ends before they are garbage.
    gc.disable()
    _keep_torch_out()
    # The answers alone go to standard output, whatever a library may print.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(what: _Answer) -> None:
        output.write(msgspec.json.encode(what) + b"\n")
        output.flush()

    settings = ModelSettings.model_validate_json(arguments[0])
    snapshot = Snapshot(Path(arguments[1]), arguments[2] or None)
    try:
        if not snapshot.gguf:
            answer(_Shape(read_shape(settings, snapshot)))
        answer(_Tokenizer(read_tokenizer(settings, snapshot)))
    except ModelLoadError as error:
        answer(_Failure(str(error)))
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
