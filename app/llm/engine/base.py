"""The engine protocol: what the API process and the engine process say to each other.

One Unix socket joins the two. A message is a 4-byte big-endian length and that many bytes of
MessagePack, typed by the structs below. The API process sends :data:`Command` messages, the
engine process :data:`Report` messages; all events of one engine step travel in one message.
Nothing here imports torch, so both sides can.
"""

import struct
from typing import Final, Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""Largest message; a tokenizer of the biggest vocabularies takes about 35 MB."""

_HEADER = struct.Struct(">I")
HEADER_BYTES: Final = _HEADER.size


GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are taken for 0: divided by them, logits leave the range of float32."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen; the defaults change nothing.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Smallest set of tokens whose probabilities reach this sum.
        top_k: Only the k likeliest tokens; 0 is no limit.
        min_p: Only tokens at least this share as likely as the likeliest.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens
            seen before (Keskar et al., 2019).
        presence_penalty: Subtracted once from the logit of a token generated before.
        frequency_penalty: Subtracted once for each time a token was generated before.
        logit_bias: Added to the logits of these tokens, by their ids, before anything else.
        seed: Makes a sampled answer repeatable, whatever else is in the batch.
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

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


NEUTRAL_SAMPLING: Final = SamplingParams()
SAMPLING_FIELDS: Final = SamplingParams.__struct_fields__

REQUEST_FEATURES: Final = ("logprobs", "top_logprobs", "grammar")
"""Fields of :class:`GenerationRequest` that a backend may not have."""


class JsonSchemaGrammar(msgspec.Struct, frozen=True, tag="json_schema"):
    """The whole answer is a JSON value of this schema.

    Attributes:
        schema: JSON Schema, as JSON text.
    """

    schema: str


class RegexGrammar(msgspec.Struct, frozen=True, tag="regex"):
    """The whole answer matches this regular expression.

    Attributes:
        pattern: Without anchors.
    """

    pattern: str


class Tag(msgspec.Struct, frozen=True):
    """A part of an answer that stands between two strings.

    Attributes:
        begin: What comes before it.
        schema: JSON Schema of the part, as JSON text.
        end: What comes after it.
    """

    begin: str
    schema: str
    end: str


class TagsGrammar(msgspec.Struct, frozen=True, tag="tags"):
    """An answer with tagged parts, such as tool calls, that follow their schemas.

    Attributes:
        tags: Each ``begin`` starts with the trigger.
        trigger: Text that must be the beginning of one of the tags wherever it comes.
        required: Whether the answer is one or more tagged parts, and no text beside them;
            otherwise it is text in which tagged parts may come.
        single: Whether the answer ends after the first tagged part.
    """

    tags: list[Tag]
    trigger: str
    required: bool = False
    single: bool = False


Grammar = JsonSchemaGrammar | RegexGrammar | TagsGrammar
"""What an answer must look like; each backend translates it for its own library."""


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as the engine sees it.

    Attributes:
        id: Unique among the requests in flight.
        prompt_token_ids: At least one token.
        max_tokens: Most tokens to generate, the end-of-sequence token included.
        sampling: How to choose them.
        logprobs: Whether to tell each token's log-probability.
        top_logprobs: How many of the likeliest tokens to tell beside it.
        grammar: What the answer must look like.
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
        request_id: Whose tokens these are.
        token_ids: New tokens, in order; an end-of-sequence token is among them.
        logprobs: Where they were asked for, the natural logarithm of each new token's
            probability by the model alone: before penalties, temperature and filters.
        top_logprobs: Where they were asked for, for each new token the likeliest tokens of its
            place and their log-probabilities, likeliest first.
        finish_reason: Set on the request's last event, and on no other.
        error: What went wrong, for the log; only beside the finish reason ``error``.
        cached_tokens: Prompt tokens found in the KV cache; on the first event only.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[tuple[int, float]]] = []
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True):
    """What is being served; sent once, when the model is ready.

    Attributes:
        model: Name callers see.
        revision: Commit or hash of the weights, where one is known.
        backend: Which backend runs it.
        backend_reason: Why this backend was chosen.
        device: ``cpu`` or the CUDA device's name.
        dtype: Precision of the weights.
        context_length: Most tokens of prompt and answer together.
        vocabulary_size: Tokens the model has embeddings for; ids are below it.
        supported: What this backend honours: names of sampling fields, and of
            :data:`REQUEST_FEATURES`.
        tokenizer_json: The tokenizer, as the ``tokenizers`` library serialises it.
        chat_template: The model's Jinja template; ``None`` where it has none.
        special_tokens: ``bos_token``, ``eos_token`` and the like, for the template.
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


class EngineStats(msgspec.Struct, frozen=True):
    """Figures of the moment, sent with every step."""

    running: int = 0
    kv_cache_usage: float = 0.0


# --- API process -> engine process --------------------------------------------------------------


class Configure(msgspec.Struct, frozen=True, tag=True):
    """First message: what to load. The token travels here so that no environment shows it."""

    model: dict[str, str | bool | int | float | list[str] | None]
    max_running: int
    echo_step_seconds: float
    huggingface_token: str | None
    log_level: str
    log_format: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Generate."""

    request: GenerationRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop generating; answered by the request's terminal event if it had none yet."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave, now."""


# --- engine process -> API process --------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of loading, for the log and /status.

    Attributes:
        message: What is being done.
        fetching: Whether it waits for the network, or for another process that downloads the
            same; then standing still is no sign of a fault.
    """

    message: str
    fetching: bool = False


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded, and is being tried out; what can be made ready for it can be now."""

    info: EngineInfo


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Requests are taken; comes after :class:`Loaded`."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; one line that says what to do. The process ends after it."""

    message: str


class Step(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What happened since the last report; sent after a step, and before one that starts requests.

    Attributes:
        events: All events of the step.
        stats: Figures of the moment.
        started: Ids of the requests that are in the batch from the next step on.
    """

    events: list[TokenEvent]
    stats: EngineStats
    started: list[str] = []


Command = Configure | Submit | Cancel | Stop
Report = Loading | Loaded | Ready | LoadFailed | Step
Message = Command | Report

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def pack(message: Message) -> bytes:
    """Frame ``message`` for the socket."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Length of the body that follows a header.

    Raises:
        ValueError: The peer announces more than :data:`MAX_MESSAGE_BYTES`.
    """
    length: int = _HEADER.unpack(header)[0]
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is too large")
    return length


def unpack_command(body: bytes) -> Command:
    """Decode what the API process sent."""
    return _command_decoder.decode(body)


def unpack_report(body: bytes) -> Report:
    """Decode what the engine process sent."""
    return _report_decoder.decode(body)


class Backend(Protocol):
    """What runs the model, inside the engine process; one thread owns it.

    A new backend is one file that implements this and one row in ``app/llm/loader.py``.
    """

    @property
    def info(self) -> EngineInfo:
        """What is being served."""

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step's batch.

        Raises:
            Exception: This request cannot be run; its neighbours are not affected.
        """

    def cancel(self, request_id: str) -> None:
        """Free a request's place before the next step; unknown ids are ignored."""

    def step(self) -> list[TokenEvent]:
        """Advance every request by one step and return what it brought."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> EngineStats:
        """Figures of the moment."""
