"""The section ``logging`` of the settings."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from app.core.config.base import Section


def _level(value: Any) -> Any:
    """A level by the name that other programs give it: debug, WARN."""
    upper = value.upper() if isinstance(value, str) else value
    return "WARNING" if upper == "WARN" else upper


class LoggingSettings(Section):
    """The log on standard error."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_level)] = Field(
        "INFO", description="Lowest level logged."
    )
    format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="json: one object a line; text: lines for people; auto: text at a terminal, "
        "else json.",
    )
    audit: bool = Field(
        False,
        description="One line more, at any level, for each request for an answer: key, model, "
        "tokens, outcome; never text.",
    )
