"""Requests and responses of the native routes, and the error shape of all routes.

Numbers are numbers: ``"16"``, ``true`` and NaN are refused, unknown fields too.
"""

from typing import Annotated, Any, Literal, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.core.security import Principal
from app.llm.engine.base import SAMPLING_FIELDS
from app.services.answers import Completion

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "content_filter"]

MAX_STOPS = 4
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class RequestModel(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SamplingFields(RequestModel):
    """How the answer is generated; shared by /v1/generate and /v1/chat."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens to generate; at most, and by default, model.max_tokens.",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 always takes the likeliest token; default: model.temperature.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Only the likeliest tokens up to this sum.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="Only the k likeliest tokens; 0: all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Only tokens at least this share as likely as the likeliest."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=2, description="Above 1: tokens seen before become less likely."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: tokens generated before become less likely."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: the more often generated, the less likely."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before the first of these; a string, or up to four."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Makes a sampled answer repeatable."
    )
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    cache: bool = Field(True, description="false: neither read nor write the response cache.")


class GenerateRequest(SamplingFields):
    """Body of POST /v1/generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Explain quantum computing in simple terms",
                    "max_tokens": 200,
                    "temperature": 0.7,
                }
            ]
        }
    )

    prompt: str = Field(min_length=1, description="At most security.max_prompt_chars characters.")


class Message(RequestModel):
    """One turn of a chat."""

    role: Role
    content: str = Field(min_length=1)


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_tokens": 100,
                    "temperature": 0.7,
                }
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=1000)
    session_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="Keeps the conversation; with it, only the new messages are sent.",
    )

    @model_validator(mode="after")
    def _system_comes_first(self) -> Self:
        if any(m.role == "system" for m in self.messages[1:]):
            raise ValueError("only the first message may have the role system")
        if self.messages[-1].role == "system":
            raise ValueError("a message to answer must follow the one with the role system")
        return self


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="Tokens found in the engine's KV cache.")


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dropped_messages: int | None = Field(
        None, description="Messages of the history that did not fit the context."
    )


class AnswerFields(BaseModel):
    """What every complete answer tells beside its text."""

    id: str
    model: str
    tokens_generated: int
    cached: bool
    finish_reason: FinishReason
    usage: Usage


class GenerateResponse(AnswerFields):
    """Answer of POST /v1/generate."""

    generated_text: str
    prompt: str


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatResponse(AnswerFields):
    """Answer of POST /v1/chat."""

    message: AssistantMessage
    session_id: str | None = None


class AnyMessage(BaseModel):
    """One message of a kept conversation."""

    role: str
    content: str


class SessionResponse(BaseModel):
    """Answer of GET /v1/sessions/{id}."""

    session_id: str
    system: str | None = Field(description="The system message, where one was sent.")
    messages: list[AnyMessage]
    created_at: float = Field(description="Unix time.")
    ttl_seconds: float = Field(description="How long it is kept after its last turn.")


class HealthResponse(BaseModel):
    """Answer of GET /health."""

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["healthy", "loading", "unhealthy", "draining"]
    model_loaded: bool
    model_name: str


class QueueStatus(BaseModel):
    """How full the engine is."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int
    kv_cache_usage: float = Field(description="Share of the KV cache in use, 0 to 1.")


class EngineStatus(BaseModel):
    """What is served, and by what; the empty members are known once the model is loaded."""

    state: str
    message: str | None = Field(description="What the engine is doing, while it is not ready.")
    backend: str | None = None
    backend_reason: str | None = None
    device: str | None = None
    dtype: str | None = None
    context_length: int | None = None
    supported_parameters: list[str] = []
    restarts: int
    queue: QueueStatus


class ModelStatus(BaseModel):
    """The served model."""

    name: str
    source: str
    revision: str | None = None


class CacheStatus(BaseModel):
    """The response cache."""

    enabled: bool
    entries: int
    bytes: int
    max_entries: int
    max_bytes: int
    ttl_seconds: float
    hits: int
    misses: int


class SessionsStatus(BaseModel):
    """The conversations that are kept."""

    enabled: bool
    active: int
    max_sessions: int
    ttl_seconds: float


class LimitsStatus(BaseModel):
    """The limits in force."""

    max_tokens: int
    max_prompt_chars: int
    max_body_bytes: int
    queue_timeout_seconds: float
    request_timeout_seconds: float
    rate_limit_enabled: bool
    requests_per_minute: int
    burst_size: int


class StatusResponse(BaseModel):
    """Answer of GET /status."""

    name: str
    version: str
    environment: str
    uptime_seconds: float
    model: ModelStatus
    engine: EngineStatus
    cache: CacheStatus
    sessions: SessionsStatus
    limits: LimitsStatus


class ProbeResponse(BaseModel):
    """Answer of GET /livez and /readyz."""

    status: str


class ErrorBody(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class ErrorResponse(BaseModel):
    """The one error shape of every route."""

    error: ErrorBody


def answer_fields(completion: Completion) -> dict[str, Any]:
    """The members of :class:`AnswerFields` for a completion."""
    return {
        "id": completion.id,
        "model": completion.model,
        "tokens_generated": completion.completion_tokens,
        "cached": completion.cached,
        "finish_reason": completion.finish_reason,
        "usage": usage(completion),
    }


def usage(completion: Completion) -> Usage:
    """A completion's token counts."""
    return Usage(
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        total_tokens=completion.prompt_tokens + completion.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=completion.cached_tokens),
        dropped_messages=completion.dropped_messages or None,
    )


def job_fields(
    body: SamplingFields, caller: Principal, deadline: float | None, request: Request
) -> dict[str, Any]:
    """The arguments of a :class:`Job` that /v1/generate and /v1/chat share."""
    no_cache = "no-cache" in request.headers.get("cache-control", "").lower()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "sampling": {name: getattr(body, name) for name in _SAMPLING_FIELDS},
        "stop": stop,
        "caller": caller.key_id,
        "cache": body.cache and not no_cache,
        "deadline": deadline,
    }


# The temperature has a configured default of its own.
_SAMPLING_FIELDS = tuple(
    name
    for name in SAMPLING_FIELDS
    if name in SamplingFields.model_fields and name != "temperature"
)
