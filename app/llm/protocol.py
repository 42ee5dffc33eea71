"""The engine protocol: what the API process and the engine process say to each other.

A Unix socket connects the two. A message is a 4-byte big-endian length, then that many bytes of
MessagePack, typed by the structs below. The API process sends :data:`Command` messages, the engine
process :data:`Report` messages; all events of one engine step are in one message.
"""

import struct
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""Largest message; a tokenizer of the biggest vocabularies takes about 35 MB."""

_HEADER = struct.Struct(">I")
HEADER_BYTES: Final = _HEADER.size

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this count as 0: logits divided by them would exceed float32."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen; the defaults change nothing.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Smallest set of tokens whose probabilities reach this sum.
        top_k: Only the k likeliest tokens; 0 is no limit.
        min_p: Only tokens at least this share as likely as the likeliest.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens in
            the prompt and the answer (Keskar et al., 2019).
        presence_penalty: Subtracted once from the logit of a token generated before.
        frequency_penalty: Subtracted once for each time a token was generated before.
        logit_bias: By token id, added to the token's logit before anything else.
        seed: Makes a sampled answer repeatable, whatever else is in the batch.
        min_tokens: Before this many tokens no end-of-sequence token is chosen.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    min_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature < GREEDY_BELOW


NEUTRAL_SAMPLING: Final = SamplingParams()
SAMPLING_FIELDS: Final = SamplingParams.__struct_fields__

REQUEST_FEATURES: Final = ("logprobs", "top_logprobs", "grammar")
"""Fields of :class:`GenerationRequest` that a backend may not support."""


class JsonSchemaGrammar(msgspec.Struct, frozen=True, tag="json_schema"):
    """The whole answer is a JSON value of this schema, which is JSON text.

    Attributes:
        strict: Whether it is held in full or refused; the engine gets strict ones alone.
        where: The request field that has it, for errors.
    """

    schema: str
    strict: bool = True
    where: str = "response_format.json_schema.schema"


ANY_OBJECT: Final = JsonSchemaGrammar('{"type": "object"}')
"""Any JSON object."""


class RegexGrammar(msgspec.Struct, frozen=True, tag="regex"):
    """The whole answer matches this regular expression, which has no anchors."""

    pattern: str


Notation = Literal["json", "xml", "gemma"]
"""How a call's arguments are written: as JSON, ``<parameter=a>`` for each, or ``a:1,b:true``.

The last two, Qwen's and Gemma 4's, stand between the braces of a JSON object.
"""


class Tag(msgspec.Struct, frozen=True):
    """A part of an answer between two strings; see :class:`JsonSchemaGrammar` for its schema."""

    begin: str
    schema: str
    end: str
    strict: bool = True
    where: str = "tools"
    notation: Notation = "json"


class SharedFrame(msgspec.Struct, frozen=True):
    """What stands before, between and behind tagged parts that follow one another."""

    opening: str
    separator: str
    closing: str


class TagsGrammar(msgspec.Struct, frozen=True, tag="tags"):
    """An answer with tagged parts, such as tool calls, that follow their schemas.

    Attributes:
        tags: Each ``begin`` starts with the trigger, or their shared frame's opening does.
        trigger: Wherever the answer has this text, one of the tags begins.
        required: Whether the answer consists of one or more tagged parts alone; otherwise it is
            text that may have tagged parts.
        single: Whether the answer ends after the first tagged part.
        otherwise: What the answer may be instead of tagged parts; only with ``required``.
        text_begin: What stands before an answer that does not begin with a tagged part.
        shared: The frame of all tagged parts, behind which the answer ends.
    """

    tags: list[Tag]
    trigger: str
    required: bool = False
    single: bool = False
    otherwise: JsonSchemaGrammar | RegexGrammar | None = None
    text_begin: str = ""
    shared: SharedFrame | None = None


Grammar = JsonSchemaGrammar | RegexGrammar | TagsGrammar
"""What an answer must look like; each backend translates it for its library."""


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as the engine sees it.

    Attributes:
        id: Unique among the requests in flight.
        prompt_token_ids: At least one token.
        max_tokens: Most tokens to generate, including the end-of-sequence token.
        logprobs: Whether events have each token's log-probability.
        top_logprobs: How many of the likeliest tokens events have for each token.
    """

    id: str
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step brought one request.

    Attributes:
        token_ids: New tokens, in order, including an end-of-sequence token.
        logprobs: If asked for, one for each new token: the natural logarithm of its probability by
            the model alone, before penalties, temperature and filters.
        top_logprobs: If asked for, one list for each new token: the likeliest tokens at its
            position and their log-probabilities, likeliest first.
        finish_reason: Set on the request's last event only.
        error: What went wrong, for the log; only with the finish reason ``error``.
        refused: Whether the error is that the engine's library refuses the request's grammar.
        cached_tokens: Prompt tokens found in the KV cache; on the first event only.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[tuple[int, float]]] = []
    finish_reason: FinishReason | None = None
    error: str | None = None
    refused: bool = False
    cached_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True):
    """What is being served; sent once, when the model is loaded.

    Attributes:
        model: Name callers see.
        revision: Commit or hash of the weights, if one is known.
        backend_reason: Why this backend was chosen.
        device: ``cpu`` or the CUDA device's name.
        dtype: Precision of the weights.
        context_length: Most tokens of prompt and answer together.
        vocabulary_size: How many tokens the model has embeddings for; ids are below it.
        supported: Names of the sampling fields and :data:`REQUEST_FEATURES` that this backend
            supports.
        tokenizer_json: The tokenizer, as the ``tokenizers`` library serialises it.
        chat_template: The model's Jinja template; ``None`` if it has none.
        special_tokens: The texts of ``bos_token``, ``eos_token`` and others, for the template.
        sampling: What the model's authors recommend, by the names of :class:`SamplingParams`.
    """

    model: str
    revision: str | None
    backend: str
    backend_reason: str
    device: str
    dtype: str
    context_length: int
    vocabulary_size: int
    supported: frozenset[str]
    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    sampling: dict[str, float] = {}


class EngineStats(msgspec.Struct, frozen=True):
    """Figures of the moment, sent with every step.

    Attributes:
        running: Requests in the batch.
        kv_cache_usage: Part of the KV cache that is in use, from 0 to 1.
    """

    running: int = 0
    kv_cache_usage: float = 0.0


# --- API process -> engine process --------------------------------------------------------------


class Configure(msgspec.Struct, frozen=True, tag=True):
    """First message: what to load. It has the token, so that no environment shows it."""

    model: dict[str, str | bool | int | float | list[str] | None]
    max_running: int
    echo_step_seconds: float
    huggingface_token: str | None
    log_level: str
    log_format: str
    vllm_arguments: dict[str, Any] = {}


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Generate; the engine starts requests in the order of these messages."""

    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop generating; the request's last event follows if it has not been sent."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process now."""


# --- engine process -> API process --------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of loading, for the log and /status.

    Attributes:
        fetching: Whether it waits for the network, or for another process that downloads the same
            model. Then a process without progress is not stalled.
        percent: How much of a stage is done, where its end is known: a download's bytes, a
            model's tensors.
    """

    message: str
    fetching: bool = False
    percent: int | None = None


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and is being tried; the API process can prepare the tokenizer."""

    info: EngineInfo


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests; follows :class:`Loaded`."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; one line says what to do. The process ends after it."""

    message: str


class Step(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A step's report, and a report before each step that starts requests.

    A step without events is reported if the figures have changed, or once a second.

    Attributes:
        started: Ids of the requests that have got slots since the last report.
        log_dropped: Lines of the engine's log that have been lost since the last report.
    """

    events: list[TokenEvent]
    stats: EngineStats
    started: list[str] = []
    log_dropped: int = 0


Command = Configure | Submit | Cancel | Stop
Report = Loading | Loaded | Ready | LoadFailed | Step
Message = Command | Report

_encoder = msgspec.msgpack.Encoder()
unpack_command: Final[Callable[[bytes], Command]] = msgspec.msgpack.Decoder(Command).decode
unpack_report: Final[Callable[[bytes], Report]] = msgspec.msgpack.Decoder(Report).decode


def pack(message: Message) -> bytes:
    """Frame ``message`` for the socket."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Length of the body that follows a header.

    Raises:
        ValueError: It is more than :data:`MAX_MESSAGE_BYTES`.
    """
    length: int = _HEADER.unpack(header)[0]
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is too large")
    return length


class Backend(Protocol):
    """Runs the model, inside the engine process, on one thread.

    A new backend is one file that implements this and one row in ``app/llm/loader.py``.
    """

    @property
    def info(self) -> EngineInfo:
        """What is being served."""

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step's batch.

        Raises:
            Exception: This request cannot be run; others are not affected.
        """

    def cancel(self, request_id: str) -> None:
        """Free a request's slot before the next step; unknown ids are ignored."""

    def step(self) -> list[TokenEvent]:
        """Advance every request by one step and return the events."""

    def has_work(self) -> bool:
        """Whether there is work for a step."""

    def stats(self) -> EngineStats:
        """Figures of the moment."""
