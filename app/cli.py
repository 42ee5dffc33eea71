"""The commands of the service: ``llm-service serve | check | fetch-model``."""

import argparse
import asyncio
import errno
import sys
from collections.abc import Sequence

import uvicorn

from app.core.config import PROJECT_ROOT, AppSettings, load_settings
from app.core.config.variables import read_env_file
from app.llm.loader import check_model
from app.llm.models import bundled
from app.main import create_app
from app.utils.errors import StartupError


def serve() -> int:
    """Serve HTTP on ``app.host`` and ``app.port``."""
    settings = load_settings()
    app = create_app(settings)
    # With its default log_config, uvicorn would replace the handlers that were just configured.
    uvicorn.run(app, host=settings.app.host, port=settings.app.port, log_config=None)
    return 0


def check() -> int:
    """Check all that a start needs, without downloading or loading the model."""
    settings = load_settings()
    # The application and the model's files are checked by what a start does with them.
    create_app(settings)
    token = settings.huggingface_token
    check_model(settings.model, token=token.get_secret_value() if token else None)
    asyncio.run(_check_address(settings.app))
    where = "" if settings.model.source == "bundled" else f" {settings.model.name}"
    print(f"the configuration is valid: {settings.model.source}{where} on {settings.model.device}")  # noqa: T201 - the command's answer
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


def fetch_model() -> int:
    """Fetch the bundled model."""
    # It may name the folder of models, HF_HOME.
    read_env_file(PROJECT_ROOT / ".env")
    print(bundled.fetch())  # noqa: T201 - the command's answer
    return 0


_COMMANDS = {"serve": serve, "check": check, "fetch-model": fetch_model}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="llm-service", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in _COMMANDS.items():
        commands.add_parser(name, help=function.__doc__)
    options = parser.parse_args(arguments)
    try:
        return _COMMANDS[options.command]()
    except (StartupError, bundled.FetchError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - logging may not be configured yet
        return 1
