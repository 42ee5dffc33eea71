"""``llm-service pull``: fetch a model's files before a start needs them."""

from app.core.config import load_settings
from app.llm.loader import find_model


def pull(name: str | None, revision: str | None) -> int:
    """Fetch the configured model, or a named one of the hub; returns the exit status.

    Raises:
        StartupError: It is not available.
    """
    settings = load_settings()
    token = settings.huggingface_token
    chosen = {"revision": revision or settings.model.revision}
    if name is not None:
        chosen |= {"name": name, "source": "hub", "revision": revision}
    snapshot = find_model(
        settings.model.model_copy(update=chosen),
        token=token.get_secret_value() if token else None,
        progress=print,
    )
    print(snapshot.directory / (snapshot.gguf or ""))
    return 0
