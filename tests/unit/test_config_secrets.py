"""Keys and tokens in the settings are never shown, and are strong in production."""

import hashlib
import json
from typing import Any

import pytest

from app.core.config.security import DEFAULT_API_KEY
from tests.support.settings import Load, check_refused

STRONG_KEY = "0123456789abcdef" * 2
SECRET = "s3cr3t-value-of-mine"

SECRET_CONFIGS = {
    "not a string": f"security: {{api_key: [{SECRET}]}}",
    "a section": f"security: {SECRET}",
    "an unknown key beside it": f"security: {{api_key: {SECRET}, nmae: 1}}",
    "a bad value beside it": f"security: {{api_key: {SECRET}, max_prompt_chars: 0}}",
    "a key without a name": f"security: {{api_keys: [{{key: {SECRET}}}]}}",
    "keys that are no list": f"security: {{api_keys: {SECRET}}}",
    "keys that are no objects": f"security: {{api_keys: [{SECRET}]}}",
    "a key in place of a name": f"security: {{api_keys: [{{name: '{SECRET} x', key: a}}]}}",
    "the token": f"huggingface_token: [{SECRET}]",
    "malformed YAML": f'security:\n  api_key: "{SECRET}\nmodel: {{}}',
    "malformed YAML after it": f"security: {{api_key: {SECRET}: x}}",
    "a misspelt section": f"securty: {{api_key: {SECRET}}}",
    "an alias": f"security: {{api_key: *{SECRET}}}",
    "a tag": f"security: {{api_key: !{SECRET} x}}",
}


@pytest.mark.parametrize("config", SECRET_CONFIGS.values(), ids=SECRET_CONFIGS.keys())
def test_a_mistake_near_a_secret_does_not_show_it(load: Load, config: str) -> None:
    """No error about config.yml shows a key or a token, whatever its fault is."""
    assert SECRET not in check_refused(load, config=config)


@pytest.mark.parametrize(
    "env",
    [
        f"SECURITY__API_KEYS={SECRET}",
        f'SECURITY__API_KEYS=[{{"name": "a", "key": "{SECRET}"',
        f'SECURITY__API_KEYS=[{{"key": "{SECRET}"}}]',
        f'SECURITY={{"api_key": "{SECRET}", "max_prompt_chars": 0}}',
        f"SECURITY={SECRET}",
        f'SECURITY={{"api_key": "{SECRET}"',
        f"SECURITY__API_KEY={SECRET}\nSECURITY__MAX_BODY_BYTES=1",
        f"SECURITY__API_KEY__X={SECRET}",
    ],
)
@pytest.mark.parametrize("source", ["dotenv", "environment"])
def test_a_mistake_in_the_environment_does_not_show_a_secret(
    load: Load, monkeypatch: pytest.MonkeyPatch, env: str, source: str
) -> None:
    """No error about .env or the environment shows a key or a token."""
    if source == "environment":
        for line in env.splitlines():
            monkeypatch.setenv(*line.split("=", 1))
        env = ""
    assert SECRET not in check_refused(load, env=env)


def test_settings_do_not_show_secrets_when_printed(load: Load) -> None:
    """Printed settings hide keys and the token."""
    settings = load(
        f"security: {{api_key: {SECRET}, api_keys: [{{name: a, key: {SECRET}x}}]}}\n"
        f"huggingface_token: {SECRET}"
    )
    assert SECRET not in repr(settings) + str(settings) + str(settings.model_dump())


# --- Production -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", DEFAULT_API_KEY, "short", "x" * 31])
def test_production_refuses_a_weak_key(load: Load, key: str) -> None:
    """In production the default key, an empty key and a key under 32 characters stop the start."""
    config = json.dumps({"app": {"environment": "production"}, "security": {"api_key": key}})
    line = check_refused(load, config=config)
    assert "api_key" in line.lower()
    if key not in ("", "short"):
        assert key not in line


@pytest.mark.parametrize("key", [DEFAULT_API_KEY, "short", "x" * 31])
def test_production_refuses_a_weak_key_among_several(load: Load, key: str) -> None:
    """A single weak key among api_keys stops the start in production."""
    security = {"api_key": STRONG_KEY, "api_keys": [{"name": "a", "key": key}]}
    config = json.dumps({"app": {"environment": "production"}, "security": security})
    check_refused(load, "production", "32", "API_KEYS", config=config)


def test_production_starts_with_strong_keys(load: Load) -> None:
    """Keys of 32 characters are accepted in production."""
    security = {"api_key": STRONG_KEY, "api_keys": [{"name": "a", "key": STRONG_KEY[::-1]}]}
    config = json.dumps({"app": {"environment": "production"}, "security": security})
    assert load(config).app.environment == "production"


def test_development_takes_the_default_key(load: Load) -> None:
    """Outside production the user's default key is accepted, so that a first start works."""
    assert load().security.api_key.get_secret_value() == DEFAULT_API_KEY


@pytest.mark.parametrize("key", [DEFAULT_API_KEY, ""])
def test_production_refuses_a_weak_digest(load: Load, key: str) -> None:
    """The digest of the default key or of an empty key stops the start in production."""
    keys = [{"name": "a", "digest": f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"}]
    config = json.dumps({"app": {"environment": "production"}, "security": {"api_keys": keys}})
    check_refused(load, "production", config=config)


def test_production_starts_with_digests_alone(load: Load) -> None:
    """With api_keys the default api_key is not accepted, so production does not reject it."""
    keys = [{"name": "a", "digest": f"sha256:{'0' * 64}", "scopes": ["infer", "metrics"]}]
    config = json.dumps({"app": {"environment": "production"}, "security": {"api_keys": keys}})
    assert [key.name for key in load(config).security.accepted_keys] == ["a"]


# --- Named keys -----------------------------------------------------------------------------------

DIGEST = f"sha256:{hashlib.sha256(SECRET.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ([{"name": "a"}], "either key or digest"),
        ([{"name": "a", "key": SECRET, "digest": DIGEST}], "either key or digest"),
        ([{"name": "a", "digest": SECRET}], "digest"),
        ([{"name": "a", "digest": DIGEST.upper()}], "digest"),
        ([{"name": "a", "digest": DIGEST[7:]}], "digest"),
        ([{"name": "a", "key": SECRET, "scopes": []}], "scopes"),
        ([{"name": "a", "key": SECRET, "scopes": ["root"]}], "'infer', 'metrics' or 'admin'"),
        ([{"name": "a", "key": SECRET, "daily_tokens": 0}], "daily_tokens"),
        ([{"name": "a", "key": SECRET, "budget": 1}], "budget"),
        ([{"name": "default", "key": SECRET}], "the name default"),
        ([{"name": "a", "key": SECRET}, {"name": "a", "key": "other"}], "the name a"),
        ([{"name": "a", "key": SECRET}, {"name": "b", "digest": DIGEST}], "the same key"),
        ([{"name": "a", "key": f"{SECRET} "}], "ends with a blank"),
    ],
)
def test_an_invalid_key_is_refused(load: Load, keys: Any, fault: str) -> None:
    """Repeated names or keys, unknown scopes and the like give one line without secrets."""
    line = check_refused(load, fault, config=json.dumps({"security": {"api_keys": keys}}))
    assert SECRET not in line
    assert DIGEST[7:] not in line.lower()


def test_a_key_is_for_generating_unless_it_says_more(load: Load) -> None:
    """A named key without scopes has the scope infer only; api_key has every scope."""
    settings = load(f"security: {{api_key: {STRONG_KEY}, api_keys: [{{name: a, key: b}}]}}")
    scopes = {key.name: key.scopes for key in settings.security.accepted_keys}
    assert scopes == {"default": ["infer", "metrics", "admin"], "a": ["infer"]}
