"""``llm-service check``: what a start would do, without downloading or loading the model."""

import asyncio
import errno

from app.core.config import AppSettings, load_settings
from app.llm.loader import check_model
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
    check_model(settings.model, token=token.get_secret_value() if token else None)
    asyncio.run(_check_address(settings.app))
    where = "" if settings.model.source == "bundled" else f" {settings.model.name}"
    print(f"the configuration is valid: {settings.model.source}{where} on {settings.model.device}")
    return 0


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
