"""Write docs/configuration.md and .env.example from the settings model.

With `--check` nothing is written; the script says whether these files and config.yml agree with the
model. A test checks the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr

from app.core.config import Settings

ROOT = Path(__file__).resolve().parents[1]
TABLE_FILE = ROOT / "docs" / "configuration.md"
ENV_FILE = ROOT / ".env.example"
YAML_FILE = ROOT / "config.yml"

# The variables that .env.example sets, in this order; all others are comments in it.
_SET_IN_ENV = {
    "Model Configuration": ("MODEL__NAME", "HUGGINGFACE_TOKEN"),
    "Security": ("SECURITY__API_KEY",),
    "Rate Limiting": ("RATE_LIMIT__REQUESTS_PER_MINUTE",),
    "Cache": ("CACHE__ENABLED", "CACHE__SIZE"),
}
# Samples for .env.example where the default is secret or null.
_SAMPLES = {
    "HUGGINGFACE_TOKEN": "your_token_here",
    "SECURITY__API_KEY": "your-secure-api-key-here",
    "MODEL__REVISION": "main",
    "ENGINE__PYTHON": "/opt/vllm/bin/python",
    "ENGINE__MAX_CONTEXT": "8192",
    "ENGINE__KV_CACHE_MEMORY_SHARE": "0.9",
    "ENGINE__QUANTIZATION": "fp8",
    "MODEL__CHAT_TEMPLATE": "templates/qwen3.jinja",
    "RATE_LIMIT__BURST_SIZE": "10",
    "SERVER__MAX_CONNECTIONS_PER_IP": "100",
}

_TABLE_HEAD = """\
# Configuration

<!-- Written by `python -m scripts.config_docs`; change the settings model, not this file. -->

The environment overrides `.env`, and `.env` overrides `config.yml` (or the file that `CONFIG_FILE`
names); both stand beside the `app` folder. `cp .env.example .env` makes one with every variable.

In variables two underscores join section and key: `MODEL__NAME` sets `model.name`. Lists and
objects are JSON there: `SECURITY__API_KEYS='[{"name": "ci", "key": "..."}]'`. Empty variables are
unset, quotes around a value are dropped. Settings are read once, API keys also on SIGHUP.

A misspelt setting or a wrong value ends the start with one line that names the key, its source and
what is allowed. `llm-service check` checks all but loading the model.
"""

_TABLE_END = """\
## Other variables

Libraries read these. All but the last may be in `.env`.

| Variable | What it does |
|---|---|
| `CONFIG_FILE` | Read instead of `config.yml`; must exist. |
| `HF_HOME` | Folder of downloaded models. |
| `HF_HUB_OFFLINE` | `1`: use downloaded models, no network. |
| `HF_ENDPOINT` | Address of a mirror of the hub. |
| `FORWARDED_ALLOW_IPS` | Proxies that uvicorn believes; see `security.trusted_proxies`. |
"""

_ENV_HEAD = """\
# Settings of the service: `cp .env.example .env`, then edit. The environment overrides this file,
# and this file overrides config.yml. Remove the # in front of a variable to set it; its value here
# is the default, or a sample where there is none. docs/configuration.md lists the allowed values.
# `python -m scripts.config_docs` writes this file from the settings model.
"""


class DocsError(Exception):
    """The settings model has a setting that this script cannot describe."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting.

    Attributes:
        key: Its name in config.yml, ``model.name``.
        default: Its default.
        schema: Its JSON schema, without references.
        description: Its description.
    """

    key: str
    default: Any
    schema: Mapping[str, Any]
    description: str

    @property
    def variable(self) -> str:
        """Its environment variable, such as ``MODEL__NAME``."""
        return self.key.replace(".", "__").upper()

    @property
    def default_text(self) -> str:
        """The default as a variable's value; empty for null."""
        if self.default is None:
            return ""
        value = _plain(self.default)
        return value if isinstance(value, str) else json.dumps(value)

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        return _allowed(self.schema)


def _plain(value: Any) -> Any:
    """A default as a value of YAML or JSON."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (frozenset, set, tuple)):
        return sorted(value)
    return value


def settings() -> list[Setting]:
    """Every setting, in the order of the model."""
    schema = Settings.model_json_schema()
    return list(_walk(Settings, schema, schema.get("$defs", {}), ""))


def _walk(
    model: type[BaseModel], schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str
) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        described = _resolve(schema["properties"][name], defs)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, described, defs, f"{prefix}{name}.")
            continue
        if not field.description:
            raise DocsError(f"{prefix}{name} has no description")
        default = field.get_default(call_default_factory=True)
        yield Setting(f"{prefix}{name}", default, described, field.description)


def _resolve(schema: Any, defs: Mapping[str, Any]) -> Any:
    """``schema`` with every reference replaced by its target."""
    if isinstance(schema, list):
        return [_resolve(part, defs) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _resolve({**defs[name], **{k: v for k, v in schema.items() if k != "$ref"}}, defs)
    return {key: _resolve(value, defs) for key, value in schema.items()}


def _allowed(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        # The default "not set" already says that null is allowed.
        return " or ".join(_allowed(part) for part in schema["anyOf"] if part != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "")
    if kind == "array":
        return f"list of {_plural(schema['items'])}"
    if kind == "object":
        return _object(schema)
    if kind in ("integer", "number"):
        return ("integer" if kind == "integer" else "number") + _bounds(schema)
    words = {"": "any value", "boolean": "`true`, `false`", "string": "text"}
    if kind not in words:
        raise DocsError(f"no words for {schema}")
    return "secret text" if schema.get("format") == "password" else words[kind]


def _plural(schema: Mapping[str, Any]) -> str:
    text = _allowed(schema)
    return f"{text}s" if text.endswith(("text", "number")) else text


def _object(schema: Mapping[str, Any]) -> str:
    if "properties" in schema:
        return "`{" + ", ".join(schema["properties"]) + "}`"
    values = schema.get("additionalProperties")
    return f"names with {_plural(values)}" if isinstance(values, dict) else "object"


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" {_digits(low)}-{_digits(high)}"
    bounds = (
        ("≥", low),
        (">", schema.get("exclusiveMinimum")),
        ("≤", high),
        ("<", schema.get("exclusiveMaximum")),
    )
    return ",".join(f" {sign}{_digits(value)}" for sign, value in bounds if value is not None)


def _digits(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


# --- The files ------------------------------------------------------------------------------------


def configuration_markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_TABLE_HEAD]
    for section, rows in _sections().items():
        head = [f"## `{section}`", "", _section_intro(section)] if section else ["## No section"]
        parts.append("\n".join([*head, "", *_table(rows)]) + "\n")
    return "\n".join([*parts, _TABLE_END])


def _table(rows: list[Setting]) -> Iterator[str]:
    yield "|Key|Default|Allowed|What it does|"
    yield "|---|---|---|---|"
    for row in rows:
        default = f"`{row.default_text}`" if row.default_text else "not set"
        cells = (f"`{row.key}`", default, row.allowed, row.description)
        yield "|" + "|".join(cell.replace("|", "\\|") for cell in cells) + "|"


def _sections() -> dict[str, list[Setting]]:
    found: dict[str, list[Setting]] = {}
    for setting in settings():
        section = setting.key.partition(".")[0] if "." in setting.key else ""
        found.setdefault(section, []).append(setting)
    return found


def _section_intro(section: str) -> str:
    annotation = Settings.model_fields[section].annotation
    return " ".join((annotation.__doc__ or "").split())


def env_example() -> str:
    """The text of .env.example."""
    by_variable = {setting.variable: setting for setting in settings()}
    parts = [_ENV_HEAD]
    for title, variables in _SET_IN_ENV.items():
        rows = [_env_lines(by_variable.pop(name), comment="") for name in variables]
        parts.append(f"# {title}\n" + "\n".join(rows) + "\n")
    parts.append("# Everything else\n")
    parts += [_env_lines(setting, comment="#") + "\n" for setting in by_variable.values()]
    return "\n".join(parts)


def _env_lines(setting: Setting, *, comment: str) -> str:
    sample = _SAMPLES.get(setting.variable, setting.default_text)
    if not sample:
        raise DocsError(f"{setting.variable} needs a sample in {Path(__file__).name}")
    return f"# {setting.description}\n{comment}{setting.variable}={sample}"


def yaml_faults() -> list[str]:
    """Differences between config.yml and the settings model, one line each."""
    text = YAML_FILE.read_text(encoding="utf-8")
    # A setting in a comment is one whose default depends on the model.
    found = dict(_leaves(yaml.safe_load(re.sub(r"(?m)^  # (?=\w+: )", "  ", text)), ""))
    expected = {s.key: _plain(s.default) for s in settings() if "." in s.key}
    faults = [f"config.yml lacks {key}" for key in expected if key not in found]
    faults += [f"config.yml has {key}, which is no setting" for key in found if key not in expected]
    faults += [
        f"config.yml has {key} = {found[key]!r}, the default is {value!r}"
        for key, value in expected.items()
        if key in found and found[key] != value
    ]
    uncommented = [
        line.strip()
        for line in text.splitlines()
        if line.startswith(" ") and ":" in line and "#" not in line and not line.endswith(":")
    ]
    return faults + [f"config.yml has no comment at: {line}" for line in uncommented]


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    known = {setting.key for setting in settings()}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, dict) and path not in known:
            yield from _leaves(inner, f"{path}.")
        else:
            yield path, inner


def faults() -> list[str]:
    """Differences between the files and the settings model, one line each."""
    wanted = {TABLE_FILE: configuration_markdown(), ENV_FILE: env_example()}
    stale = [
        f"{path.relative_to(ROOT)} is out of date: run python -m scripts.config_docs"
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return stale + yaml_faults()


def main() -> int:
    """Write or check the files, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        TABLE_FILE.write_text(configuration_markdown(), encoding="utf-8")
        ENV_FILE.write_text(env_example(), encoding="utf-8")
    found = faults()
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
