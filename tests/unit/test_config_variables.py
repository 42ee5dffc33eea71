"""Variables of the environment and of .env: none is lost in silence."""

import os
import re
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT, Settings, load_settings
from app.core.config.doubts import doubts
from app.core.config.security import DEFAULT_API_KEY
from app.llm.client.process import engine_environment
from tests.support.settings import Load, check_refused

STRONG_KEY = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _own_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset what .env may set for libraries, and restore it afterwards."""
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.setenv(name, "")


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MODLE__NAME", "MODEL__NAME"),
        ("RATELIMIT__ENABLED", "RATE_LIMIT__ENABLED"),
        ("CAHCE__SIZE", "CACHE__SIZE"),
        ("SECURITY_API_KEY", "SECURITY__API_KEY"),
        ("SECURTY__API_KEY", "SECURITY__API_KEY"),
        ("security_api_key", "SECURITY__API_KEY"),
    ],
)
def test_a_misspelt_variable_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    """A variable that is almost a setting ends the start with the name that was meant."""
    check_refused(load, f"{name} (in ", ".env)", f"did you mean {meant}?", env=f"{name}=x")
    monkeypatch.setenv(name, "x")
    check_refused(load, f"{name} (in the environment)", f"did you mean {meant}?")


def test_a_variable_that_may_be_another_programs_is_a_warning(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MODEL_NAME changes nothing, may belong to another program, and is warned of in one line."""
    monkeypatch.setenv("MODEL_NAME", "a/b")
    settings = load(env=f"SECURITY__API_KEY={STRONG_KEY}")
    assert settings.model.name == load().model.name
    (line,) = doubts(settings, PROJECT_ROOT / "none")
    assert line.startswith("MODEL_NAME (in the environment) is not a setting")
    assert line.endswith("did you mean MODEL__NAME?")


def test_variables_of_other_programs_are_none_of_ours(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables with two underscores of other programs are neither refused nor warned of."""
    for name in ("AIRFLOW__CORE__PARALLELISM", "DATABASE__NAME", "ASPNETCORE__URLS", "__CF_USER"):
        monkeypatch.setenv(name, "x")
    settings = load(env=f"SECURITY__API_KEY={STRONG_KEY}")
    assert doubts(settings, PROJECT_ROOT / "none") == []


# --- Values ---------------------------------------------------------------------------------------


def test_an_empty_variable_is_unset(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable of the environment or of .env leaves the setting to the next source."""
    for name in ("MODEL__NAME", "SECURITY__API_KEY", "MODEL__REVISION", "CACHE__SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CONFIG_FILE", "")
    settings = load("model: {name: a/yaml}\ncache: {size: 5}", "MODEL__NAME=a/dotenv\nCACHE__SIZE=")
    assert settings.model.name == "a/dotenv"
    assert settings.model.revision is None
    assert settings.cache.size == 5
    assert settings.security.api_key.get_secret_value() == DEFAULT_API_KEY
    assert load_settings(env_file=PROJECT_ROOT / "none").cache.size == 100
    assert "HF_HOME" not in os.environ, "a library would take the empty text for a folder"


@pytest.mark.parametrize(
    ("level", "meant"),
    [("debug", "DEBUG"), ("WARN", "WARNING"), ("warn", "WARNING"), ("Error", "ERROR")],
)
def test_a_level_is_known_by_its_usual_names(load: Load, level: str, meant: str) -> None:
    """Levels may be in lower case, and WARN is WARNING."""
    assert load(env=f"LOGGING__LEVEL={level}").logging.level == meant
    assert load(f"logging: {{level: {level}}}").logging.level == meant


def test_hf_token_is_the_token(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN works as HUGGINGFACE_TOKEN does, weaker in the same source; no engine sees it."""

    def token(env: str) -> str:
        found = load(env=env).huggingface_token
        assert found is not None
        return found.get_secret_value()

    assert token("HF_TOKEN=a") == "a"
    assert token("HF_TOKEN=a\nHUGGINGFACE_TOKEN=b") == "b"
    monkeypatch.setenv("HF_TOKEN", "c")
    assert token("HUGGINGFACE_TOKEN=b") == "c"
    assert "HF_TOKEN" not in engine_environment(os.environ)


def test_variables_of_the_hub_may_stand_in_env(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HOME and HF_HUB_OFFLINE of .env reach the libraries; the environment is stronger."""
    load(env="HF_HOME=/from/dotenv\nHF_HUB_OFFLINE=1\n")
    assert (os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"]) == ("/from/dotenv", "1")
    monkeypatch.setenv("HF_HOME", "/from/environment")
    load(env="HF_HOME=/from/dotenv")
    assert engine_environment(os.environ)["HF_HOME"] == "/from/environment"


def test_config_file_may_stand_in_env(tmp_path: Path) -> None:
    """CONFIG_FILE of .env names the YAML file, as it does with `docker run --env-file`."""
    (tmp_path / "other.yml").write_text("model: {name: other/model}")
    (tmp_path / ".env").write_text(f"CONFIG_FILE={tmp_path / 'other.yml'}")
    assert load_settings(env_file=tmp_path / ".env").model.name == "other/model"


# --- The files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (f"SECURITY__API_KEY {STRONG_KEY}", 1),
        ("\n\n# a comment\nMODEL__NAME: a/b\n", 4),
        ('CACHE__SIZE=5\n\nMODEL__NAME="a/b\n', 3),
        ("MODEL__NAME", 1),
    ],
)
def test_a_broken_line_of_env_is_refused(load: Load, env: str, line: int) -> None:
    """A line of .env that sets nothing ends the start with its number, and does not show it."""
    shown = check_refused(load, f"line {line} of ", ".env is not NAME=value", env=env)
    assert STRONG_KEY not in shown


def test_an_env_that_is_no_text_is_refused(load: Load, tmp_path: Path) -> None:
    """A .env in Latin-1, and one that is a folder, end the start with its path."""
    (tmp_path / "latin").write_bytes("SECURITY__API_KEY=Schl\xfcssel".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, fault in (("latin", "it is not UTF-8"), ("folder", "Is a directory")):
        with pytest.raises(Exception, match=re.escape(f"{tmp_path / name}: ") + ".*" + fault):
            load_settings(env_file=tmp_path / name)


@pytest.mark.parametrize(
    "config",
    [
        f"security: {{api_key: {STRONG_KEY}}}\nmodel: {{}}\nsecurity: {{max_prompt_chars: 9}}",
        f"security:\n  max_prompt_chars: 9\n  api_key: {STRONG_KEY}\n  api_key: other",
    ],
    ids=["section", "key"],
)
def test_what_is_twice_in_config_yml_is_refused(load: Load, config: str) -> None:
    """A section or key that is twice in config.yml ends the start with the second one's place."""
    line = check_refused(load, "config.yml", "a key is here a second time, line ", config=config)
    assert STRONG_KEY not in line


# --- --env-file -----------------------------------------------------------------------------------


def test_quotes_are_read_alike(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in quotes is the same from .env and from `docker run --env-file`."""
    lines = {"SECURITY__API_KEY": f'"{STRONG_KEY}"', "MODEL__ALIASES": "'[\"a\"]'"}
    ours = load(env="\n".join(f"{name}={value}" for name, value in lines.items()))
    for name, value in lines.items():
        monkeypatch.setenv(name, value)
    assert load() == ours
    assert ours.security.api_key.get_secret_value() == STRONG_KEY
    assert ours.model.aliases == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        "MODEL__NAME=a/b # the small one",
        "export MODEL__NAME=a/b",
        "MODEL__NAME=${HOME}/b",
        "MODEL__NAME = a/b",
        'MODEL__NAME="a\nb"',
        r'MODEL__NAME="a\tb"',
    ],
)
def test_what_docker_reads_differently_is_a_warning(load: Load, tmp_path: Path, line: str) -> None:
    """A line that `docker run --env-file` reads differently is warned of by its variable."""
    settings = load(env=f"SECURITY__API_KEY={STRONG_KEY}\n{line}")
    (doubt,) = doubts(settings, tmp_path / ".env")
    assert doubt.startswith("`docker run --env-file` reads MODEL__NAME of ")


def test_env_example_reads_the_same_everywhere(load: Load, tmp_path: Path) -> None:
    """No line of .env.example, commented ones included, is read differently by docker."""
    text = (PROJECT_ROOT / ".env.example").read_text(encoding="utf-8")
    settings = load(env=re.sub(r"^#\s?(?=[A-Z_]+=)", "", text, flags=re.MULTILINE))
    assert not [d for d in doubts(settings, tmp_path / ".env") if "docker" in d]


# --- Keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "part"),
    [(DEFAULT_API_KEY, "the public default"), ("your_key", "under 32 characters"), ("x" * 32, "")],
)
def test_a_weak_key_is_a_warning_in_development(key: str, part: str) -> None:
    """In development the default key and a key under 32 characters are warned of."""
    settings = Settings(_env_file=None, security={"api_key": key})
    found = doubts(settings, PROJECT_ROOT / "none")
    assert len(found) == bool(part)
    for line in found:
        assert part in line
        assert "openssl rand -hex 32" in line
        assert key not in line or key == DEFAULT_API_KEY
