"""The composition root: builds every part, once, and joins them into an application.

``uvicorn app.main:app`` works because ``app`` is made when it is first asked for; importing this
module reads no settings.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from app import __version__
from app.api.application import GuardedApplication
from app.api.dependencies import Services
from app.api.document import DOCUMENT
from app.api.errors import register_error_handlers
from app.api.guard import GeneratingRoute
from app.api.load_shedding import LoadShedding
from app.api.middleware import (
    UNSAMPLED_SPAN,
    BodyLimitMiddleware,
    CrossOriginMiddleware,
    RequestContextMiddleware,
)
from app.api.pages.routes import documentation_routes, playground_routes
from app.api.reloaded import ReloadedApplication, is_reloaded
from app.api.routers import (
    chat,
    chat_completions,
    completions,
    health,
    inference,
    models,
    responses,
    sessions,
    status,
    tokenize,
    usage,
)
from app.api.server.connections import Connections
from app.core.config import Settings, load_settings, settings_files
from app.core.config.doubts import doubts
from app.core.config.security import SecuritySettings
from app.core.event_loop import event_loop_measured
from app.core.logging import configure_logging, get_logger
from app.core.machine import compute_threads
from app.core.metrics import Metrics
from app.core.rate_limit import CallerLimits, ClientAddress
from app.core.reload import reloading_on_hangup
from app.core.security import KeyRing
from app.core.shutdown import GracefulShutdown
from app.core.traces import make_span_export
from app.core.tracing import limit_tracing
from app.llm.client.client import EngineClient
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.models.chat_template import template_library
from app.services.conversation import ConversationService
from app.services.generation import GenerationService
from app.services.response_cache import ResponseCache
from app.services.screening import Screening
from app.state.shared import make_state
from app.utils.errors import StartupError
from app.utils.garbage import no_collections

if TYPE_CHECKING:
    from app.core.otlp import SpanExport
    from app.llm.chain import Chains

log = get_logger()

EXIT_STARTUP_FAILED = 3


def exit_process(message: str) -> None:
    """End the process because the model cannot be served; one line on standard error."""
    log.critical(message)
    logging.shutdown()
    # There is nothing to finish: no request was ever accepted, or every one has had its error.
    os._exit(EXIT_STARTUP_FAILED)


def create_app(
    settings: Settings | None = None, *, on_fatal: Callable[[str], None] = exit_process
) -> FastAPI:
    """Build the application.

    Args:
        settings: Default: :func:`load_settings`.
        on_fatal: Called with one line when the model cannot be served and will not be.

    Raises:
        ConfigurationError: The settings cannot work.
    """
    settings = settings or load_settings()
    lines = configure_logging(settings.logging)
    for doubt in doubts(settings):
        log.warning(doubt)
    limit_tracing(settings.tracing, os.environ)
    spans = make_span_export(settings.app.name, os.environ)
    metrics = Metrics(lines.take_dropped)
    keys = KeyRing(settings.security, are_told=settings.metrics.require_key)
    state = make_state(settings, metrics, keys)
    engine = _make_engine(settings, metrics, on_fatal)
    generator = TextGenerator(engine)
    chains = cache(partial(_make_chains, settings, generator))
    generation = GenerationService(
        engine=engine,
        generator=generator,
        chains=chains,
        cache=ResponseCache(settings.cache, metrics, state.answers),
        screening=Screening(settings.pii, settings.output, metrics),
        model=settings.model,
        usage=state.usage,
        security=settings.security,
    )
    generation.tracer = spans.provider.get_tracer("llm-service") if spans else None
    services = Services(
        settings=settings,
        started=time.monotonic(),
        metrics=metrics,
        keys=keys,
        limits=CallerLimits(settings.rate_limit, metrics, state.share),
        addresses=ClientAddress(settings.security.trusted_proxies),
        state=state,
        shedding=LoadShedding(engine, remembered=2 * settings.cache.size),
        engine=engine,
        generation=generation,
        conversation=ConversationService(
            store=state.sessions,
            generation=generation,
            generator=generator,
            metrics=metrics,
            enabled=settings.chat_history.enabled,
        ),
    )
    app = _build(settings, services, chains, spans)
    engine.on_ready = partial(_announce, services, app)
    return app


def _announce(services: Services, app: GuardedApplication) -> None:
    """Log that requests are taken: at which address, by which engine, and with what."""
    settings, info = services.settings, services.engine.info
    if info is None:
        return
    at = f" at {app.address}" if app.address else ""
    if app.address and settings.app.has_playground:
        at += " (open it for the playground)"
    threads = f", {compute_threads(os.environ)} threads" if info.device == "cpu" else ""
    names = ("process_resident_memory_bytes", "llm_engine_process_resident_memory_bytes")
    used = sum(services.metrics.registry.get_sample_value(name) or 0 for name in names)
    engine = f"{info.backend} ({info.device}, {info.dtype}{threads})"
    size = f"{used / 1e6:,.0f} MB of memory, a context of {info.context_length:,} tokens"
    log.info("ready for requests%s: %s on %s, %s", at, info.model, engine, size)


def _make_engine(
    settings: Settings, metrics: Metrics, on_fatal: Callable[[str], None]
) -> EngineClient:
    token = settings.huggingface_token
    return EngineClient(
        model=settings.model,
        model_label=settings.model.label,
        engine=settings.engine,
        logging=settings.logging,
        huggingface_token=token.get_secret_value() if token else None,
        metrics=metrics,
        on_fatal=on_fatal,
    )


def _make_chains(settings: Settings, generator: TextGenerator) -> "Chains":
    # It takes a third of a second to import, which is to be spent while the model loads.
    from app.llm.chain import Chains, ServedPipeline

    pipeline = ServedPipeline(
        model_id=generator.engine.model_label,
        generator=generator,
        options=GenerationOptions(default_max_tokens=settings.model.max_tokens),
    )
    return Chains(pipeline, generator)


def _build(
    settings: Settings,
    services: Services,
    chains: "Callable[[], Chains]",
    spans: "SpanExport | None",
) -> GuardedApplication:
    interactive = settings.app.environment != "production"
    traced: set[str] = set()
    app = GuardedApplication(
        connections=Connections(settings.server, services.addresses, services.metrics),
        title=settings.app.name,
        version=__version__,
        **DOCUMENT,
        lifespan=_lifespan(settings, services, chains, spans),
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if interactive else None,
        # Its logs would export the messages and tracebacks of exceptions, prompts and all.
        telemetry={
            "tracing": spans is not None,
            "tracer_provider": spans and spans.provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": partial(_is_not_traced, spans, traced),
        },
    )
    app.state.services = services
    register_error_handlers(app)
    for module in (
        *(health, status, inference, chat, sessions),
        *(chat_completions, completions, responses, models, tokenize, usage),
    ):
        # An included router would be asked twice for each request.
        app.router.routes.extend(module.router.routes)
        traced |= {r.path for r in module.router.routes if isinstance(r, GeneratingRoute)}
    if interactive:
        app.router.routes.extend(documentation_routes())
    if settings.app.has_playground:
        app.router.routes.extend(playground_routes())
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.security.max_body_bytes)
    if origins := settings.security.cors_origins:
        methods = ("GET", "POST", "DELETE")
        app.add_middleware(
            CrossOriginMiddleware,
            allow_origins=origins,
            allow_methods=methods,
            allow_headers=["*"],
            expose_headers=["*"],
        )
    # Added last, so that it is outermost.
    app.add_middleware(
        RequestContextMiddleware,
        metrics=services.metrics,
        leaving=services.engine.is_draining,
    )
    return app


def _is_not_traced(
    spans: "SpanExport | None", traced: Collection[str], scope: MutableMapping[str, Any]
) -> bool:
    # The path of a session has its name.
    if spans is None or scope["type"] != "http" or scope["path"] not in traced:
        return True
    scope[UNSAMPLED_SPAN] = span = spans.unsampled(scope["headers"])
    return span is not None


def _lifespan(
    settings: Settings,
    services: Services,
    chains: "Callable[[], Chains]",
    spans: "SpanExport | None",
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Streams end by our own drain, which lets them finish or say why not; sse-starlette
        # would cut them at the first signal.
        AppStatus.disable_automatic_graceful_drain()
        loop = asyncio.get_running_loop()

        def prepare() -> None:
            with no_collections():
                chains().pipeline.loop = loop
                template_library()

        async with event_loop_measured(services.metrics), services.state.connected:
            with (
                GracefulShutdown(services.engine, settings.app),
                reloading_on_hangup(partial(_replace_keys, services)),
            ):
                await services.engine.start(prepare)
                try:
                    yield
                finally:
                    await services.engine.stop()
                    if spans is not None:
                        await asyncio.to_thread(spans.provider.shutdown)

    return lifespan


def _replace_keys(services: Services, security: SecuritySettings) -> None:
    services.keys.replace(security)
    services.state.idempotency.keep_only({caller.key_id for caller in services.keys.principals})


def __getattr__(name: str) -> Any:
    """Make ``app`` when uvicorn asks for it; a bad configuration ends the start with one line."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    application: FastAPI | ReloadedApplication
    if is_reloaded():
        application = ReloadedApplication(lambda fail: create_app(on_fatal=fail), settings_files())
    else:
        try:
            application = create_app()
        except StartupError as error:
            raise SystemExit(str(error)) from None
    globals()["app"] = application
    return application
