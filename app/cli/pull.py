"""``llm-service pull``: fetch a model's files before a start needs them."""

import logging

from app.core.config import load_settings
from app.core.logging import configure_logging, log_progress
from app.llm.loader import find_model


def pull(name: str | None, revision: str | None) -> int:
    """Fetch the configured model, or a named one of the hub; returns the exit status.

    A download that was cut off goes on with the files that are not whole.

    Raises:
        StartupError: The model is not available.
    """
    settings = load_settings()
    configure_logging(settings.logging)
    model = settings.model
    if name is not None:
        model = model.model_copy(update={"name": name, "source": "hub", "revision": None})
    if revision is not None:
        model = model.model_copy(update={"revision": revision})
    token = settings.huggingface_token
    try:
        snapshot = find_model(
            model,
            token=token.get_secret_value() if token else None,
            progress=log_progress,
        )
        log_progress(f"{model.label} is here: {snapshot.weight_bytes / 1e6:,.1f} MB of weights")
    finally:
        # A thread writes the log: what is printed next, the path or what is wrong, comes after it.
        logging.shutdown()
    print(snapshot.directory / (snapshot.gguf or ""))
    return 0
