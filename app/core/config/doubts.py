"""Settings that are allowed, and are most likely not what is wanted."""

import os
from pathlib import Path

from app.core.config import PROJECT_ROOT, Settings, variable_names
from app.core.config.security import DEFAULT_API_KEY, PRODUCTION_KEY_MIN_CHARS, digest_of
from app.core.config.variables import misspelt, read_differently


def doubts(settings: Settings, env_file: Path | None = None) -> list[str]:
    """What a start warns of, in one line each that never shows a key."""
    env_path = env_file or PROJECT_ROOT / ".env"
    found = [
        f"{name} (in the environment) is not a setting and changes nothing; did you mean {near}?"
        for name, near in misspelt(os.environ, variable_names())
    ]
    if names := read_differently(env_path):
        found.append(
            f"`docker run --env-file` reads {', '.join(names)} of {env_path} differently: it knows "
            "no comments behind a value, no export, no ${NAME} and no spaces around ="
        )
    accepted = settings.security.accepted_keys
    if any(key.sha256 == digest_of(DEFAULT_API_KEY) for key in accepted):
        found.append(
            f"the API key is the public default, {DEFAULT_API_KEY}, which lets in "
            "everyone who reaches the port; set SECURITY__API_KEY (openssl rand -hex 32 makes one)"
        )
    elif weak := [key.name for key in accepted if key.is_weak]:
        found.append(
            f"API keys under {PRODUCTION_KEY_MIN_CHARS} characters, which production refuses: "
            f"{', '.join(weak)} (openssl rand -hex 32 makes a better one)"
        )
    return found
