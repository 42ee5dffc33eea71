"""Variables of the environment and of .env: how they are read, and which look like mistakes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from app.core.config.errors import one_line
from app.utils.errors import ConfigurationError

# Other variables that .env may set: those that libraries read in the environment, and our own.
_OF_LIBRARIES = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")
_NO_SETTINGS = (*_OF_LIBRARIES, "CONFIG_FILE")
# MODLE__NAME is a mistake, DATABASE__NAME belongs to another program: the share of equal letters.
_CLOSE = 0.87


def read_env_file(path: Path) -> dict[str, str]:
    """Read a .env file, which may be missing, as python-dotenv reads it.

    Its variables for libraries are put into the environment, unless they are set there.

    Raises:
        ConfigurationError: One line: it cannot be read, or one of its lines sets no variable.
    """
    values = {n: v for n, v in dotenv_values(stream=StringIO(_checked(path))).items() if v}
    upper = {name.upper(): value for name, value in values.items()}
    for name in _OF_LIBRARIES:
        if not os.environ.get(name):
            # An empty variable means unset, but the libraries would take it for a value.
            os.environ.pop(name, None)
            os.environ.update({name: upper[name]} if name in upper else {})
    return values


def _checked(path: Path) -> str:
    """The text of a .env file in which each line is a variable, a comment or empty."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        fault = one_line(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"configuration error: cannot read {path}: {fault}") from None
    for binding in parse_stream(StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            found = binding.original.string
            blank = found[: len(found) - len(found.lstrip())]
            raise ConfigurationError(
                f"configuration error: line {binding.original.line + blank.count(chr(10))} of "
                f"{path} is not NAME=value, or a quote in it is not closed"
            )
    return text


def cleaned(variables: Mapping[str, str | None]) -> dict[str, str]:
    """The settings among variables, by their names in lower case.

    An empty variable means unset. Quotes around a value are dropped, as python-dotenv does:
    ``docker run --env-file`` leaves them. HF_TOKEN is another name for HUGGINGFACE_TOKEN.
    """
    found = {name.lower(): _unquoted(value or "") for name, value in variables.items()}
    found["huggingface_token"] = found.get("huggingface_token") or found.pop("hf_token", "")
    found.pop("hf_token", None)
    return {n: v for n, v in found.items() if v and n.upper() not in _NO_SETTINGS}


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def misspelt(variables: Mapping[str, str], known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Variables that set nothing, each with the setting that its name is close to."""
    names = [name.upper() for name in known]
    sections = {name.partition("__")[0] for name in names}
    for name in variables:
        upper = name.upper()
        section, joined, _ = upper.partition("__")
        if upper in (*names, "HF_TOKEN") or (joined and section in sections):
            continue  # An unknown key in a known section is refused with the section's keys.
        # A comparison is slow, and a machine may have thousands of other variables.
        candidates = [known_name for known_name in names if known_name[0] == upper[:1]]
        if near := get_close_matches(upper, candidates, n=1, cutoff=_CLOSE):
            yield name, near[0]


def read_differently(path: Path) -> list[str]:
    """Variables of a .env file that have another value with ``docker run --env-file``.

    Docker takes all that follows the sign = for the value: it knows no comments behind a value, no
    ``export``, no ``${NAME}`` and no value of several lines.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = (line.lstrip().partition("=") for line in text.splitlines())
    plain = {name: _unquoted(value) for name, _, value in lines}
    return [n for n, v in dotenv_values(stream=StringIO(text)).items() if plain.get(n) != v]
