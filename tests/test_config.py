"""Settings: their sources, the order of the sources, and the errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from app.core.config import PROJECT_ROOT, Settings, load_settings
from app.core.config.security import digest_of
from app.main import create_app
from app.utils.errors import ConfigurationError
from tests.support.service import running_service, setting_names
from tests.support.settings import Load, check_refused

USERS_CONFIG = """
app:
  name: "LLM FastAPI Service"
  host: "0.0.0.0"
  port: 8000

model:
  name: "google/gemma-2-2b-it"
  source: "hub"  # or "local"
  device: "cpu"   # or "cuda"
  max_tokens: 512
  temperature: 0.7

security:
  api_key: "change-me-in-env"
  max_prompt_chars: 4000

rate_limit:
  enabled: true
  requests_per_minute: 10

cache:
  enabled: true
  size: 100
  ttl_seconds: 3600

chat_history:
  enabled: true
  ttl_seconds: 7200  # 2 hours
"""

USERS_ENV = """
# Model Configuration
MODEL__NAME=google/gemma-2-2b-it
HUGGINGFACE_TOKEN=your_token_here

# Security
SECURITY__API_KEY=your-secure-api-key-here

# Rate Limiting
RATE_LIMIT__REQUESTS_PER_MINUTE=10

# Cache
CACHE__ENABLED=true
CACHE__SIZE=100
"""

# --- Sources and their order ----------------------------------------------------------------------


def test_the_users_config_yml_loads(load: Load) -> None:
    """The config.yml of the user's document is valid unchanged, and has the defaults."""
    assert load(USERS_CONFIG) == load()


def test_the_users_env_loads(load: Load) -> None:
    """The .env of the user's document is valid unchanged."""
    settings = load(USERS_CONFIG, USERS_ENV)
    assert settings.security.api_key.get_secret_value() == "your-secure-api-key-here"
    assert settings.huggingface_token is not None
    assert settings.huggingface_token.get_secret_value() == "your_token_here"


def test_every_key_of_the_user_has_the_users_default() -> None:
    """The defaults are the values of the user's document."""
    settings = Settings(_env_file=None)
    for section, values in yaml.safe_load(USERS_CONFIG).items():
        for key, value in values.items():
            found = getattr(getattr(settings, section), key)
            plain = found.get_secret_value() if isinstance(found, SecretStr) else found
            assert plain == value, f"{section}.{key}"


def test_env_wins_over_config_yml(load: Load) -> None:
    """.env overrides config.yml key by key: the other keys of a section stay."""
    settings = load("model: {name: a/yaml, max_tokens: 64}", "MODEL__NAME=a/dotenv")
    assert settings.model.name == "a/dotenv"
    assert settings.model.max_tokens == 64


def test_the_environment_wins_over_env(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment overrides .env and config.yml key by key, in upper or lower case."""
    monkeypatch.setenv("MODEL__NAME", "a/environment")
    monkeypatch.setenv("cache__size", "7")
    settings = load(
        "model: {name: a/yaml, max_tokens: 64}\ncache: {size: 5}",
        "MODEL__NAME=a/dotenv\nMODEL__TEMPERATURE=0.1\nCACHE__SIZE=6",
    )
    assert settings.model.name == "a/environment"
    assert settings.model.temperature == 0.1
    assert settings.model.max_tokens == 64
    assert settings.cache.size == 7


def test_the_token_has_no_section(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """HUGGINGFACE_TOKEN is read without a section, with the same order of sources."""
    assert load().huggingface_token is None
    token = load("huggingface_token: from-yaml", "HUGGINGFACE_TOKEN=from-env").huggingface_token
    assert token is not None
    assert token.get_secret_value() == "from-env"
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "from-environment")
    token = load("huggingface_token: from-yaml", "HUGGINGFACE_TOKEN=from-env").huggingface_token
    assert token is not None
    assert token.get_secret_value() == "from-environment"


def test_lists_are_json_in_the_environment(load: Load) -> None:
    """A list or an object in .env or the environment is JSON."""
    settings = load(
        "",
        'SECURITY__TRUSTED_PROXIES=["10.0.0.0/8"]\n'
        'SECURITY__API_KEYS=[{"name": "team", "key": "k1"}]',
    )
    assert settings.security.trusted_proxies == ["10.0.0.0/8"]
    (key,) = settings.security.api_keys
    assert (key.name, key.sha256) == ("team", digest_of("k1"))


def test_config_file_names_another_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONFIG_FILE in the environment replaces config.yml."""
    other = tmp_path / "other.yml"
    other.write_text("model: {name: other/model}")
    monkeypatch.setenv("CONFIG_FILE", str(other))
    assert load_settings(env_file=tmp_path / "none").model.name == "other/model"


def test_a_config_file_that_is_named_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CONFIG_FILE that is missing or a folder is rejected in one line with its path."""
    for path in (tmp_path / "missing.yml", tmp_path):
        monkeypatch.setenv("CONFIG_FILE", str(path))
        with pytest.raises(ConfigurationError, match=re.escape(str(path))) as caught:
            load_settings(env_file=tmp_path / "none")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_config_yml_is_all_defaults(load: Load, text: str) -> None:
    """An empty config.yml leaves every setting at its default."""
    assert load(text) == Settings(_env_file=None)


def test_settings_are_frozen(load: Load) -> None:
    """Neither the settings nor a section can be changed after the start."""
    settings = load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.model = settings.model  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.model.name = "x/y"  # type: ignore[misc]


# --- Mistakes -------------------------------------------------------------------------------------

BAD_VALUES = {
    "text for a number": ("app: {port: eight}", ["app.port", "'eight'", "config.yml", "integer"]),
    "too large": ("app: {port: 65536}", ["app.port", "65536", "65535"]),
    "too small": ("cache: {size: 0}", ["cache.size", "0", "greater than or equal to 1"]),
    "not a choice": ("model: {device: tpu}", ["model.device", "'tpu'", "'cpu' or 'cuda'"]),
    "infinity": ("engine: {request_timeout_seconds: .inf}", ["engine.request_timeout_seconds"]),
    "not a number": ("model: {temperature: .nan}", ["model.temperature"]),
    "temperature": ("model: {temperature: 2.1}", ["model.temperature", "2.1", "equal to 2"]),
    "null": ("model: {name: null}", ["model.name", "string"]),
    "list for text": ("model: {name: [a]}", ["model.name", "string"]),
    "text for a section": ("model: fast", ["model", "'fast'", "config.yml"]),
    "list for a section": ("model: [a]", ["model", "config.yml"]),
    "two at once": ("app: {port: x}\ncache: {size: y}", ["app.port", "cache.size"]),
}


@pytest.mark.parametrize(("config", "parts"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_names_key_value_origin_and_what_is_allowed(
    load: Load, config: str, parts: list[str]
) -> None:
    """An invalid value gives one line with the key, the value, its source and what is allowed."""
    check_refused(load, *parts, config=config)


def test_a_bad_value_in_env_names_the_file_and_the_variable(load: Load, tmp_path: Path) -> None:
    """An invalid value from .env is reported with the file and the variable."""
    origin = f"(in {tmp_path / '.env'}, MODEL__MAX_TOKENS)"
    check_refused(load, "model.max_tokens = 'many'", origin, env="MODEL__MAX_TOKENS=many")


def test_a_bad_value_in_the_environment_names_the_variable(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid value from the environment is reported with its variable, not with .env's."""
    monkeypatch.setenv("MODEL__MAX_TOKENS", "lots")
    origin = "(in the environment, MODEL__MAX_TOKENS)"
    check_refused(load, "model.max_tokens = 'lots'", origin, env="MODEL__MAX_TOKENS=8")


@pytest.mark.parametrize(
    ("config", "env", "parts"),
    [
        ("modle: {name: a}", "", ["modle", "config.yml", "model"]),
        ("model: {nmae: a}", "", ["model.nmae", "config.yml", "name"]),
        ("", "MODEL__NMAE=a", ["model.nmae", ".env", "MODEL__NMAE", "name"]),
        ("_env_file: x", "", ["_env_file"]),
        ("1: {name: a}", "", ["sections"]),
        ("[model]", "", ["sections"]),
        ("just text", "", ["sections"]),
    ],
    ids=["section", "key", "variable", "underscore", "number", "list", "text"],
)
def test_an_unknown_key_is_refused_and_the_known_ones_named(
    load: Load, config: str, env: str, parts: list[str]
) -> None:
    """An unknown key is rejected in one line that names the known keys."""
    check_refused(load, *parts, config=config, env=env)


def test_an_unknown_variable_of_a_section_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt variable of a section is rejected; variables of other programs are ignored."""
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    load()
    monkeypatch.setenv("MODEL__NMAE", "x")
    check_refused(load, "model.nmae", "the environment, MODEL__NMAE", "max_tokens")


@pytest.mark.parametrize(
    "config",
    [
        "model: {",
        "model:\n\tname: a",
        "a: b: c",
        "model: !!python/name:os.system",
        "\x00",
        "&a [*b]",
    ],
)
def test_malformed_yaml_is_refused_in_one_line(load: Load, config: str) -> None:
    """A config.yml that is not YAML, or has tags, is rejected in one line with its path."""
    check_refused(load, "config.yml is not YAML", config=config)


def test_a_config_yml_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """A config.yml that is not UTF-8 is rejected in one line with its path."""
    path = tmp_path / "config.yml"
    path.write_bytes(b"model: {name: \xff}")
    with pytest.raises(ConfigurationError, match=re.escape(f"cannot read {path}")) as caught:
        load_settings(config_file=path, env_file=tmp_path / "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["10.0.0.0/8", "[10.0.0.0/8]", '["10.0.0.0/8"', "{}"])
def test_a_list_that_is_not_json_says_how_to_write_it(load: Load, value: str) -> None:
    """A list in .env that is not JSON is rejected in one line."""
    check_refused(load, "SECURITY__TRUSTED_PROXIES", env=f"SECURITY__TRUSTED_PROXIES={value}")


@pytest.mark.parametrize("value", ["nonsense", "10.0.0.0/99", "", "proxy.example.org"])
def test_a_trusted_proxy_that_is_no_address_is_refused(load: Load, value: str) -> None:
    """A trusted proxy that is no address or network is rejected in one line."""
    config = f"security: {{trusted_proxies: [10.0.0.1, {json.dumps(value)}]}}"
    check_refused(load, "trusted_proxies", config=config)


# --- The files of the repository ------------------------------------------------------------------


def leaves(model: type[BaseModel] | BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, with its default."""
    found: dict[str, Any] = {}
    for name, field in type(model).model_fields.items() if isinstance(model, BaseModel) else ():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = (
                value.get_secret_value() if isinstance(value, SecretStr) else value
            )
        assert field.description or isinstance(value, BaseModel), f"{prefix}{name}: no description"
    return found


def test_config_yml_lists_every_setting_with_its_default() -> None:
    """The repository's config.yml names each setting once, with exactly its default."""
    text = (PROJECT_ROOT / "config.yml").read_text(encoding="utf-8")
    # A configured temperature wins over the model's, so its line is in a comment.
    content = yaml.safe_load(text.replace("  # temperature:", "  temperature:"))
    listed = {
        f"{s}.{key}": value for s, section in content.items() for key, value in section.items()
    }
    defaults = leaves(Settings(_env_file=None))
    # A committed file must not hold a token, so config.yml does not list it.
    del defaults["huggingface_token"]
    assert listed == defaults


def test_env_example_names_real_settings_only(load: Load) -> None:
    """Every variable of .env.example is a setting; the file is valid unchanged and uncommented."""
    text = (PROJECT_ROOT / ".env.example").read_text(encoding="utf-8")
    named = re.findall(r"^#?\s?([A-Z][A-Z_]+)=", text, re.MULTILINE)
    assert named
    assert set(named) <= set(setting_names())
    load(env=text)
    load(env=re.sub(r"^#\s?(?=[A-Z_]+=)", "", text, flags=re.MULTILINE))


# --- Starting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"APP__PORT": "eight"}, ["app.port = 'eight'", "APP__PORT", "integer"]),
        ({"MODEL__NMAE": "x"}, ["model.nmae", "not a setting"]),
        ({"APP__ENVIRONMENT": "production", "SECURITY__API_KEY": "short"}, ["SECURITY__API_KEY"]),
        ({"CONFIG_FILE": "/nowhere/config.yml"}, ["/nowhere/config.yml does not exist"]),
    ],
    ids=["value", "name", "production", "file"],
)
def test_uvicorn_stops_with_one_readable_line(variables: dict[str, str], parts: list[str]) -> None:
    """`uvicorn app.main:app` with an invalid setting ends with a status and one line."""
    with running_service(until="started", **variables) as service:
        assert service.wait() > 0
        (line,) = service.raw_log().splitlines()
    for part in parts:
        assert part in line


def test_importing_the_application_reads_no_settings(tmp_path: Path) -> None:
    """`import app.main` works with invalid settings; only `app.main.app` reads them."""
    program = (
        "import app.main\n"
        "try:\n"
        "    app.main.app\n"
        "except SystemExit as end:\n"
        "    print('ended:', end)\n"
        "try:\n"
        "    app.main.nothing\n"
        "except AttributeError:\n"
        "    print('no such attribute')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        env={**os.environ, "CONFIG_FILE": str(tmp_path / "none.yml")},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    ended, missing = done.stdout.splitlines()
    assert ended.startswith("ended: configuration error: ")
    assert missing == "no such attribute"


def test_create_app_takes_the_settings_it_is_given(load: Load) -> None:
    """The application is built from the settings that are passed to create_app."""
    app = create_app(load("app: {name: My Service}\nmodel: {engine: echo}"))
    assert app.title == "My Service"
