"""Describes faults of the settings in one line that never shows a key or a token."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError


class Origins:
    """Finds the source of an invalid value, the strongest source first."""

    def __init__(
        self,
        fields: Mapping[str, FieldInfo],
        yaml_path: Path,
        yaml_values: Mapping[str, Any],
    ) -> None:
        self._fields = fields
        self._yaml_path = yaml_path
        self._yaml = yaml_values
        self._variables: list[tuple[dict[str, str], str]] = []

    def add_variables(self, variables: Mapping[str, str], place: str) -> None:
        """Add a source of variables, weaker than those added before it."""
        upper = {name.upper(): value for name, value in variables.items()}
        self._variables.append((upper, place))

    def explain(self, error: ValidationError | SettingsError) -> str:
        """What is wrong, and where."""
        if isinstance(error, ValidationError):
            return "; ".join(map(self._describe, error.errors()))
        return (
            f"{self._not_json()} is not JSON; lists and objects in the environment are JSON, "
            "such as '[\"10.0.0.0/8\"]'"
        )

    def _describe(self, error: Any) -> str:
        """A pydantic error as a clause: key, value, source, and what is allowed."""
        path = [str(part) for part in error["loc"]]
        message = str(error["msg"]).removeprefix("Value error, ")
        if not path:
            return message
        key = ".".join(path)
        value, origin = self._find(path)
        if error["type"] == "extra_forbidden":
            known = ", ".join(self._known_keys(path))
            return f"{key} ({origin}) is not a setting; known here: {known}"
        shown = "" if _is_secret(path) or value is None else f" = {value!r}"
        return f"{key}{shown} ({origin}): {message}"

    def _not_json(self) -> str:
        """The name and source of the variable that must be JSON and is not."""
        for variables, place in self._variables:
            for name in self._json_variables():
                if name in variables and not _is_json(variables[name]):
                    return f"{name} (in {place})"
        return "a variable"

    def _find(self, path: list[str]) -> tuple[Any, str]:
        # The path of a list's item ends with its index, but the variable holds the whole list,
        # whose other items may be secret. So a value is shown only where the whole path matches.
        for length in range(len(path), 0, -1):
            name = "__".join(path[:length]).upper()
            for variables, place in self._variables:
                if name in variables:
                    value = variables[name] if length == len(path) else None
                    return value, f"in {place}, {name}"
        found: Any = self._yaml
        for part in path:
            found = found.get(part) if isinstance(found, Mapping) else None
        return found, f"in {self._yaml_path}"

    def _known_keys(self, path: list[str]) -> list[str]:
        fields: Mapping[str, FieldInfo] = self._fields
        for part in path[:-1]:
            annotation = fields[part].annotation if part in fields else None
            fields = getattr(annotation, "model_fields", {})
        return list(fields)

    def _json_variables(self) -> Iterator[str]:
        """Names of variables that hold an object or a list."""
        for section, field in self._fields.items():
            members = getattr(field.annotation, "model_fields", None)
            if members is not None:
                yield section.upper()
                for name, member in members.items():
                    if get_origin(member.annotation) is list:
                        yield f"{section}__{name}".upper()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def yaml_fault(error: yaml.YAMLError) -> str:
    """The fault and its place, without text of the file, which may be a key."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    mark = error.problem_mark
    problem = re.sub(r"'[^']{3,}'", "'...'", error.problem or "malformed")
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"


def _is_secret(path: list[str]) -> bool:
    # A value in the place of the section `security` is most likely a key.
    if path == ["security"]:
        return True
    return any("key" in part or "token" in part for part in path) and path[-1] != "max_tokens"


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
