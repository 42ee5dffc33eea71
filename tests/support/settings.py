"""Loading settings from texts, and checking the error for invalid ones."""

from collections.abc import Callable

import pytest

from app.core.config import Settings
from app.utils.errors import ConfigurationError

Load = Callable[..., Settings]
"""Loads settings from the text of a config.yml and of a .env, see the fixture ``load``."""


def check_refused(load: Load, *parts: str, config: str = "", env: str = "") -> str:
    """Assert that the settings are refused in one line that holds ``parts``; returns the line."""
    with pytest.raises(ConfigurationError) as caught:
        load(config, env)
    line = str(caught.value)
    assert line.startswith("configuration error: ")
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line
