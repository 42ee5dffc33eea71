"""The commands of the service: ``python -m app serve | check | fetch-model``."""

import argparse
import sys
from collections.abc import Sequence

import uvicorn

from app.core.config import load_settings
from app.core.logging import configure_logging
from app.llm.models import bundled
from app.main import create_app
from app.utils.errors import StartupError


def serve() -> int:
    """Serve HTTP on ``app.host`` and ``app.port``."""
    settings = load_settings()
    configure_logging(settings.logging)
    # With its default log_config, uvicorn would replace the handlers that were just configured.
    uvicorn.run(
        create_app(settings), host=settings.app.host, port=settings.app.port, log_config=None
    )
    return 0


def check() -> int:
    """Check the configuration, and print the model that would be served."""
    settings = load_settings()
    where = "" if settings.model.source == "bundled" else f" {settings.model.name}"
    print(f"the configuration is valid: {settings.model.source}{where} on {settings.model.device}")  # noqa: T201 - the command's answer
    return 0


def fetch_model() -> int:
    """Fetch the bundled model."""
    print(bundled.fetch())  # noqa: T201 - the command's answer
    return 0


_COMMANDS = {"serve": serve, "check": check, "fetch-model": fetch_model}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in _COMMANDS.items():
        commands.add_parser(name, help=function.__doc__)
    options = parser.parse_args(arguments)
    try:
        return _COMMANDS[options.command]()
    except (StartupError, bundled.FetchError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - logging may not be configured yet
        return 1
