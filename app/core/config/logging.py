"""The section ``logging`` of the settings."""

from typing import Literal

from pydantic import Field

from app.core.config.base import Section


class LoggingSettings(Section):
    """The log on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level logged."
    )
    format: Literal["json", "text"] = Field(
        "json", description="json: one object a line; text: lines for a terminal."
    )
