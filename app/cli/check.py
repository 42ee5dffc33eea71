"""``llm-service check``: what a start would do, without downloading or loading the model."""

import asyncio
import errno
import os

from app.core.config import AppSettings, ModelSettings, load_settings
from app.core.machine import available_memory, compute_threads
from app.llm.loader import Plan, check_model
from app.main import create_app
from app.utils.errors import StartupError


def check() -> int:
    """Print what a start would do; returns the exit status.

    Raises:
        StartupError: It would fail.
    """
    settings = load_settings()
    # The application and the model's files are checked by what a start does with them.
    create_app(settings)
    token = settings.huggingface_token
    plan = check_model(
        settings.model,
        max_running=settings.engine.max_running,
        token=token.get_secret_value() if token else None,
    )
    asyncio.run(_check_address(settings.app))
    device = settings.model.device
    threads = f", {compute_threads(os.environ)} threads" if device == "cpu" else ""
    print(f"model    {_describe(settings.model, plan)}")
    print(f"engine   {plan.engine or 'not known yet'}: {plan.reason}")
    print(f"device   {device}{threads}")
    print(f"memory   {_memory(plan)}")
    print(f"address  http://{settings.app.host}:{settings.app.port}")
    where = "" if settings.model.source == "bundled" else f" {settings.model.name}"
    print(f"the configuration is valid: {settings.model.source}{where} on {device}")
    return 0


def _describe(model: ModelSettings, plan: Plan) -> str:
    """The model, its format and its size, or how it comes here."""
    if plan.engine == "echo":
        return "none"
    if plan.snapshot is None:
        return f"{model.label}: a start fetches it if it is not here; llm-service pull does now"
    size = f"{plan.snapshot.weight_bytes / 1e6:,.1f} MB"
    return f"{model.label}: {plan.snapshot.weights or 'safetensors'}, {size}"


def _memory(plan: Plan) -> str:
    free = available_memory()
    text = f"{free / 1e9:.1f} GB free"
    if plan.snapshot is not None and plan.snapshot.weight_bytes > free:
        text += ", less than the weights take: the start will most likely fail"
    return text


async def _check_address(app: AppSettings) -> None:
    """Check that ``serve`` may listen on its address, as uvicorn does it.

    Raises:
        StartupError: It may not. A port that is taken is no fault: the service may be running.
    """
    try:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, app.host, app.port, start_serving=False)
        server.close()
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            raise StartupError(f"cannot listen on {app.host}, port {app.port}: {error}") from None
