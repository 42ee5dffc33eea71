"""The spans of a generation, in the terms of OpenTelemetry's conventions for generative AI.

They are made at its end, so that a token costs nothing. None has any text.
"""

import asyncio
import time

from opentelemetry import trace
from opentelemetry.trace import StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from app.llm.client.place import Place
from app.llm.generator import GenerationOptions
from app.llm.report import GenerationReport
from app.services.answers import Job
from app.utils.errors import ServiceError


def record_generation(
    tracer: Tracer,
    model: str,
    job: Job,
    options: GenerationOptions,
    place: Place,
    end: GenerationReport | BaseException | None,
) -> None:
    """Record a generation that has ended, below the span of its HTTP request; ``end`` says how."""
    if not trace.get_current_span().get_span_context().trace_flags.sampled:
        return
    now, now_ns = time.perf_counter(), time.time_ns()

    def at(moment: float) -> int:
        return now_ns - round((now - moment) * 1e9)

    operation = "chat" if job.prompt is None else "text_completion"
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": place.id,
        "gen_ai.request.max_tokens": options.max_tokens or options.default_max_tokens,
        "gen_ai.request.temperature": options.sampling.temperature,
        "gen_ai.request.top_p": options.sampling.top_p,
        "gen_ai.usage.input_tokens": place.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": place.cached_tokens,
        "gen_ai.usage.output_tokens": place.completion_tokens,
    }
    phases = place.phases(now)
    with tracer.start_as_current_span(
        f"{operation} {model}",
        start_time=at(phases[0][1]),
        attributes=attributes,
        end_on_exit=False,
    ) as span:
        for name, begin, phase_end in phases:
            tracer.start_span(name, start_time=at(begin)).end(at(phase_end))
    if isinstance(end, GenerationReport):
        span.set_attribute("gen_ai.response.finish_reasons", [end.finish_reason])
    else:
        span.set_attribute("error.type", _kind_of(end))
        span.set_status(StatusCode.ERROR)
    span.end(now_ns)


def _kind_of(error: BaseException | None) -> str:
    if isinstance(error, ServiceError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
