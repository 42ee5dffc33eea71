"""LangSmith's tracing, which LangChain switches on by environment variables alone."""

from collections.abc import MutableMapping

from app.core.config import TracingSettings
from app.core.logging import get_logger

log = get_logger()

# LANGSMITH_TRACING=true sends every prompt and answer away. With LANGCHAIN_TRACING, of an older
# version, each request fails. The other names say where to, or are secrets.
_PREFIXES = ("LANGSMITH_", "LANGCHAIN_")


def limit_tracing(settings: TracingSettings, environment: MutableMapping[str, str]) -> None:
    """Remove LangSmith's variables from ``environment``, unless the settings allow them.

    LangChain reads them once, so this has to come before its import.
    """
    if settings.langsmith:
        log.warning("tracing.langsmith: prompts and unscreened answers may be sent to LangSmith")
        return
    for name in [name for name in environment if name.startswith(_PREFIXES)]:
        del environment[name]
