"""Settings from config.yml, .env and the environment, validated once and frozen.

.env overrides config.yml, and the environment overrides both. Two underscores join section and key
in .env and the environment: ``MODEL__NAME`` is ``model.name``. An unknown key or an invalid value
is a :class:`ConfigurationError` of one line.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from app.core.config.base import Section
from app.core.config.engine import EngineSettings
from app.core.config.errors import Origins
from app.core.config.logging import LoggingSettings
from app.core.config.security import PRODUCTION_KEY_MIN_CHARS, SecuritySettings
from app.core.config.server import ServerSettings
from app.core.config.state import StateSettings
from app.core.config.variables import cleaned, misspelt, read_env_file
from app.core.config.yaml_file import read_yaml
from app.utils.errors import ConfigurationError

PROJECT_ROOT = Path(__file__).resolve().parents[3]
BUNDLED_NAME = "SmolLM2-135M-Instruct"


class AppSettings(Section):
    """The service's name, address and shutdown."""

    name: str = Field("LLM FastAPI Service", description="Title in the OpenAPI document.")
    host: str = Field("0.0.0.0", description="Address that `llm-service serve` binds.")  # noqa: S104 - a container must listen on all interfaces  # nosec B104
    port: int = Field(8000, ge=0, le=65535, description="Port that `llm-service serve` binds.")
    environment: Literal["development", "production"] = Field(
        "development",
        description="production refuses the default API key and those under 32 characters, where "
        "development warns, and hides /docs.",
    )
    playground: bool | Literal["auto"] = Field(
        "auto",
        description="Whether `/` is a page to try the model; auto: except in production.",
    )
    shutdown_grace_seconds: float = Field(
        20.0, ge=0, le=3600, description="Seconds that running requests may take after SIGTERM."
    )
    shutdown_notice_seconds: float = Field(
        1.0,
        ge=0,
        le=3600,
        description="Seconds, within the grace, that an idle service still answers with 503 after "
        "SIGTERM; longer than a load balancer takes to see that it is not ready.",
    )

    @property
    def has_playground(self) -> bool:
        """Whether the playground is served."""
        if self.playground == "auto":
            return self.environment != "production"
        return self.playground


class ModelSettings(Section):
    """Which model, from where, and how it is run."""

    name: str = Field(
        "google/gemma-2-2b-it",
        min_length=1,
        description="Hub repository (owner/name, or owner/name/FILE.gguf), or a local path.",
    )
    source: Literal["hub", "local", "bundled"] = Field(
        "hub",
        description="hub downloads `name`, local reads it from disk, bundled ignores it and uses "
        "SmolLM2-135M-Instruct.",
    )
    aliases: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        ["default"],
        description="Further names of the model on the OpenAI routes.",
    )
    revision: str | None = Field(
        None, min_length=1, description="Branch, tag or commit on the hub; default: main."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the weights; auto: the device's fastest."
    )
    quantization: Literal["auto", "none", "int8", "int4"] = Field(
        "auto",
        description="Integers in large linear layers of safetensors on a CPU: faster, smaller, "
        "less exact. auto: the best that fits into memory, int8 for models over a billion "
        "parameters, else none.",
    )
    cuda_memory_share: float = Field(
        0.8,
        gt=0,
        le=0.95,
        description="Share of a CUDA device's free memory for the KV cache and the steps' tensors.",
    )
    engine: Literal["auto", "openvino", "transformers", "vllm", "echo"] = Field(
        "auto",
        description="Backend that runs the model. auto: openvino on a CPU where it can read the "
        "model (GGUF, OpenVINO), vllm on a GPU where it is installed, else transformers. openvino "
        "converts safetensors. echo repeats the prompt, for tests.",
    )
    max_tokens: int = Field(
        512, ge=1, le=1_000_000, description="Most tokens of an answer, and the default."
    )
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja file in place of the model's own."
    )
    max_tokens_policy: Literal["clamp", "refuse"] = Field(
        "clamp",
        description="What OpenAI's routes do with a larger max_tokens; clamp cuts it "
        "(X-Max-Tokens-Applied).",
    )
    reasoning_names: list[Literal["reasoning_content", "reasoning"]] = Field(
        ["reasoning_content"],
        min_length=1,
        max_length=2,
        description="Members of /v1/chat/completions that have the reasoning.",
    )
    temperature: float = Field(
        0.7,
        ge=0,
        le=2,
        description="Temperature of a request that names none; unset: the model's own, "
        "else the default.",
    )

    @property
    def label(self) -> str:
        """The model's name in answers; known before the model is loaded."""
        if self.engine == "echo":
            return "echo"
        return BUNDLED_NAME if self.source == "bundled" else self.name


class RateLimitSettings(Section):
    """A token bucket for each caller."""

    enabled: bool = Field(True, description="Limit the rate of requests.")
    requests_per_minute: int = Field(
        10, ge=1, le=1_000_000, description="Tokens that a bucket regains a minute."
    )
    burst_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Tokens in a full bucket; default: requests_per_minute.",
    )


class CacheSettings(Section):
    """Answers kept for identical requests."""

    enabled: bool = Field(True, description="Answer identical requests from the cache.")
    size: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Most answers; the API key that has most makes room.",
    )
    ttl_seconds: float = Field(3600, gt=0, description="Seconds that an answer is kept.")
    max_bytes: int = Field(
        67_108_864, ge=4096, le=1_099_511_627_776, description="Most bytes of kept answers."
    )


class IdempotencySettings(Section):
    """Answers kept for requests that are repeated with the same Idempotency-Key."""

    enabled: bool = Field(True, description="Accept the header; false: reject requests with it.")
    ttl_seconds: float = Field(3600, gt=0, description="Seconds that they are kept.")
    max_entries: int = Field(1000, ge=1, le=1_000_000, description="Most answers of one API key.")
    max_bytes: int = Field(
        16_777_216,
        ge=65_536,
        le=1_099_511_627_776,
        description="Most bytes of one API key's answers, of which one may take a quarter.",
    )


class ChatHistorySettings(Section):
    """Conversations of callers that send a session_id, and responses of /v1/responses."""

    enabled: bool = Field(True, description="Keep conversations and responses.")
    ttl_seconds: float = Field(7200, gt=0, description="Seconds that an idle conversation is kept.")
    max_sessions: int = Field(
        10_000,
        ge=1,
        le=10_000_000,
        description="Most conversations and responses; the API key that has most makes room.",
    )
    max_messages: int = Field(
        200, ge=2, le=100_000, description="Most messages kept of a conversation."
    )
    max_bytes: int = Field(
        268_435_456,
        ge=4096,
        le=1_099_511_627_776,
        description="Most bytes of all of them, of which one may take a quarter.",
    )


class NamedPattern(Section):
    """A configured pattern of personal data."""

    name: str = Field(min_length=1, max_length=32, description="Replaces the match, in brackets.")
    pattern: str = Field(min_length=1, description="RE2 syntax.")


# YAML reads an unquoted off as a boolean.
_Off = BeforeValidator(lambda value: "off" if value is False else value)
PiiKind = Literal["email", "phone", "ssn", "card", "iban", "ip"]
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "SE", "BR", "IN", "AU")
"""The default of ``pii.regions``."""


class PiiSettings(Section):
    """Personal data in prompts and answers."""

    input: Annotated[Literal["off", "redact", "reject"], _Off] = Field(
        "off", description="Action on personal data in prompts."
    )
    output: Annotated[Literal["off", "redact"], _Off] = Field(
        "off", description="Action on personal data in answers."
    )
    kinds: list[PiiKind] = Field(
        default_factory=lambda: list(get_args(PiiKind)), description="Kinds to look for."
    )
    regions: list[Annotated[str, Field(pattern="^[A-Z]{2}$")]] = Field(
        default_factory=lambda: list(REGIONS),
        description="Countries whose national phone numbers are found (ISO 3166-1).",
    )
    patterns: list[NamedPattern] = Field(
        default_factory=list, description="Further patterns, each {name, pattern} in RE2 syntax."
    )


class OutputSettings(Section):
    """Text that answers must not contain."""

    blocked_patterns: list[str] = Field(
        default_factory=list,
        description="RE2 patterns that end an answer, with the finish reason content_filter.",
    )


class MetricsSettings(Section):
    """The route /metrics."""

    require_key: bool = Field(
        False,
        description="Ask for an API key on /metrics, and name the keys there; open metrics call "
        "each of them other.",
    )


class TracingSettings(Section):
    """What LangChain may send to LangSmith."""

    langsmith: bool = Field(
        False,
        description="Obey LANGSMITH_TRACING and its like, which send prompts and unscreened "
        "answers away.",
    )


class Settings(BaseSettings):
    """All settings. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_nested_delimiter="__",
        env_file_encoding="utf-8",
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    app: AppSettings = AppSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    server: ServerSettings = ServerSettings()
    security: SecuritySettings = SecuritySettings()
    rate_limit: RateLimitSettings = RateLimitSettings()
    cache: CacheSettings = CacheSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    chat_history: ChatHistorySettings = ChatHistorySettings()
    state: StateSettings = StateSettings()
    pii: PiiSettings = PiiSettings()
    output: OutputSettings = OutputSettings()
    metrics: MetricsSettings = MetricsSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()
    huggingface_token: Annotated[
        SecretStr | None,
        Field(description="Token for gated hub models; also HF_TOKEN; never shown."),
    ] = None

    @model_validator(mode="after")
    def _refuse_weak_keys_in_production(self) -> "Settings":
        if self.app.environment != "production":
            return self
        if any(key.is_weak for key in self.security.accepted_keys):
            raise ValueError(
                "app.environment is production: set SECURITY__API_KEY, and every key of "
                f"SECURITY__API_KEYS, to a key of your own of at least {PRODUCTION_KEY_MIN_CHARS} "
                "characters (openssl rand -hex 32 makes one)"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the interface
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the interface
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, strongest first."""
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):
                source.env_vars = cleaned(source.env_vars)
        # The values of config.yml are passed as init arguments. They come last, so that .env and
        # the environment override them key by key.
        return env_settings, dotenv_settings, init_settings


def load_settings(*, config_file: Path | None = None, env_file: Path | None = None) -> Settings:
    """Read config.yml, .env and the environment.

    Args:
        config_file: The YAML file; default: the environment's ``CONFIG_FILE``, else config.yml
            beside the ``app`` package, which may be missing.
        env_file: The .env file; default: the one beside the ``app`` package, which may be missing.

    Raises:
        ConfigurationError: One line with the key, its value and what is allowed.
    """
    env_path = env_file or PROJECT_ROOT / ".env"
    dotenv = read_env_file(env_path)
    named = config_file or os.environ.get("CONFIG_FILE") or dotenv.get("CONFIG_FILE")
    yaml_path = Path(named or PROJECT_ROOT / "config.yml")
    values = read_yaml(yaml_path, Settings.model_fields, required=bool(named))
    for place, variables in (("the environment", os.environ), (env_path, dotenv)):
        for name, near in misspelt(variables, variable_names()):
            # A variable that another program may own is logged: see app.core.config.doubts.
            if variables is dotenv or "__" in name or near.startswith("SECURITY__"):
                fault = f"{name} (in {place}) is not a setting; did you mean {near}?"
                raise ConfigurationError(f"configuration error: {fault}")
    try:
        return Settings(_env_file=env_path, **values)
    except (ValidationError, SettingsError) as error:
        origins = Origins(Settings.model_fields, yaml_path, values)
        origins.add_variables(cleaned(os.environ), "the environment")
        origins.add_variables(cleaned(dotenv), str(env_path))
        raise ConfigurationError(f"configuration error: {origins.explain(error)}") from None


def settings_files() -> list[Path]:
    """The .env and the YAML file that :func:`load_settings` reads by default."""
    return [
        PROJECT_ROOT / ".env",
        Path(os.environ.get("CONFIG_FILE") or PROJECT_ROOT / "config.yml"),
    ]


def variable_names() -> list[str]:
    """The variable of each setting, such as ``MODEL__NAME``."""
    names = []
    for name, field in Settings.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        names += [f"{name}__{key}".upper() for key in keys] if keys else [name.upper()]
    return names
