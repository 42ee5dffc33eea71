"""Reads config.yml."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from app.core.config.errors import one_line, yaml_fault
from app.utils.errors import ConfigurationError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = "a key is here a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, known: Iterable[str], *, required: bool) -> dict[str, Any]:
    """Read the sections of a YAML file, all ``known``; one that is not required may be missing.

    Raises:
        ConfigurationError: The file's fault in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise ConfigurationError(f"configuration error: {path} does not exist") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        fault = f"configuration error: cannot read {path}: {one_line(error)}"
        raise ConfigurationError(fault) from None
    try:
        values = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a safe loader  # nosec B506
    except yaml.YAMLError as error:
        fault = f"configuration error: {path} is not YAML: {yaml_fault(error)}"
        raise ConfigurationError(fault) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(f"configuration error: {path} must hold sections, such as model:")
    unknown = sorted(set(values).difference(known))
    if unknown:
        # Settings(**values) would take names with a leading underscore for options of its own.
        raise ConfigurationError(
            f"configuration error: {unknown[0]} (in {path}) is not a setting; "
            f"known: {', '.join(known)}"
        )
    return values
