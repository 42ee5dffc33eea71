"""Fetch the bundled model: `make model`, or `python -m scripts.fetch_model`.

Does nothing, and needs no network, when the model is here already.
"""

from __future__ import annotations

import logging
import sys

from app.core.config import PROJECT_ROOT
from app.core.config.logging import LoggingSettings
from app.core.config.variables import read_env_file
from app.core.logging import configure_logging, log_progress
from app.llm.models.bundled import BUNDLED, FetchError, bundled_model_path, fetch, is_fetched
from app.llm.models.progress import Transfer
from app.utils.errors import ConfigurationError


def fetch_with_progress() -> None:
    """Fetch the bundled model, and report on standard error.

    Raises:
        FetchError: The model could not be fetched; the message says what to do.
    """
    if is_fetched():
        print(f"The bundled model is here: {bundled_model_path()}", file=sys.stderr)
        return
    print(f"Fetching the bundled model: {BUNDLED.filename} (93 MB)", file=sys.stderr, flush=True)
    configure_logging(LoggingSettings(format="text"))
    path = fetch(BUNDLED, Transfer("downloading the bundled model", log_progress).came)
    logging.shutdown()
    print(f"Checked its SHA-256 and kept it: {path}", file=sys.stderr)


def main() -> int:
    """Fetch, and return the exit status."""
    try:
        # It may name the folder of models, HF_HOME.
        read_env_file(PROJECT_ROOT / ".env")
        fetch_with_progress()
    except (ConfigurationError, FetchError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again to start over.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
