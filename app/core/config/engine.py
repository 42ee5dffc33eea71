"""Settings of the engine process."""

from typing import Any

from pydantic import Field, JsonValue

from app.core.config.base import Section


class EngineSettings(Section):
    """Limits of the engine process."""

    max_running: int = Field(
        32, ge=1, le=1024, description="Requests generated at once, in one batch."
    )
    max_waiting: int = Field(
        128,
        ge=0,
        le=100_000,
        description="Requests that may wait, the last eighth for callers that hold no place; "
        "past that, 503 at once.",
    )
    queue_timeout_seconds: float = Field(
        60.0, gt=0, le=86_400, description="Longest wait to begin; past that, 503."
    )
    request_timeout_seconds: float = Field(
        300.0, gt=0, le=86_400, description="Longest time of a request, waiting included."
    )
    step_timeout_seconds: float = Field(
        300.0,
        gt=0,
        le=86_400,
        description="Longest step; past that, the engine process starts again.",
    )
    load_timeout_seconds: float = Field(
        1800.0,
        gt=0,
        le=86_400,
        description="Longest load, downloads aside; past that, the service ends.",
    )
    stall_timeout_seconds: float = Field(
        15.0,
        ge=1,
        le=86_400,
        description="Longest that the engine process may be stopped, or with work neither run "
        "nor wait for a processor.",
    )
    max_restarts: int = Field(
        5,
        ge=0,
        le=1_000_000,
        description="Restarts of the engine process within ten minutes; at the next death the "
        "service ends.",
    )
    echo_step_seconds: float = Field(
        0.0, ge=0, le=2, description="Time of the echo engine's tokens, for load tests."
    )
    python: str | None = Field(
        None,
        min_length=1,
        description="Interpreter of the engine process; default: the service's, or .tools/vllm's.",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="vLLM: GPUs for each layer.")
    pipeline_parallel_size: int = Field(
        1, ge=1, le=1024, description="vLLM: groups of GPUs for the layers."
    )
    max_context: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="vLLM: most tokens of a request; default: the model's.",
    )
    kv_cache_memory_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="vLLM: share of a GPU's memory; default: vLLM's.",
    )
    quantization: str | None = Field(
        None, min_length=1, description="vLLM: such as fp8; default: the model's."
    )
    vllm_args: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="vLLM: more of its EngineArgs.",
    )

    @property
    def vllm_arguments(self) -> dict[str, Any]:
        """What vLLM is told beside its defaults, by the fields of its ``EngineArgs``."""
        named = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "max_model_len": self.max_context,
            "gpu_memory_utilization": self.kv_cache_memory_share,
            "quantization": self.quantization,
        }
        return {name: value for name, value in named.items() if value is not None} | self.vllm_args
