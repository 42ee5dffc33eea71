"""Responses of the native routes."""

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.llm.report import FinishReason


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="Tokens found in the engine's KV cache.")


class CompletionTokensDetails(BaseModel):
    """What the answer's tokens are."""

    reasoning_tokens: int = Field(description="Tokens of the reasoning.")


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = Field(
        CompletionTokensDetails(reasoning_tokens=0),
        description="Left out where there is no reasoning.",
    )
    dropped_messages: int = Field(
        0, description="Messages of the history that did not fit; left out where none."
    )


class GenerateResponse(BaseModel):
    """Answer of POST /v1/generate."""

    generated_text: str
    prompt: str
    model: str
    tokens_generated: int
    cached: bool
    id: str
    finish_reason: FinishReason
    usage: Usage


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning: str = Field("", description="Left out where there is none.")


class ChatResponse(BaseModel):
    """Answer of POST /v1/chat."""

    message: AssistantMessage
    model: str
    tokens_generated: int
    cached: bool
    id: str
    session_id: str = Field(default_factory=str, description="Only where one was sent.")
    finish_reason: FinishReason
    usage: Usage


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
    last_end: str | None = Field(
        description="Why the last engine process ended, where one did: its exit code, its signal, "
        "or what the watchdog found."
    )
    queue: QueueStatus


class ModelStatus(BaseModel):
    """The served model."""

    name: str
    source: str
    revision: str | None = None
    sampling: dict[str, int | float] = Field(description="Defaults of requests that name no other.")


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


class UsageCount(BaseModel):
    """What was used in some time."""

    requests: int = Field(description="Answers begun, those from the response cache included.")
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class KeyUsage(BaseModel):
    """What one key has used."""

    name: str
    today: UsageCount = Field(description="Since midnight UTC.")
    total: UsageCount = Field(description="Since the service started.")
    daily_tokens: int | None = Field(description="The key's budget for a day.")
    remaining_tokens: int | None = Field(description="What is left of it today.")


class UsageResponse(BaseModel):
    """Answer of GET /v1/usage."""

    day: date = Field(description="Today, in UTC.")
    seconds_left: int = Field(description="Until the day ends.")
    since: float = Field(description="When the service started; Unix time.")
    keys: list[KeyUsage]


class ProbeResponse(BaseModel):
    """Answer of GET /livez and /readyz."""

    status: str
