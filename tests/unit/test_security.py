"""API keys."""

import pytest
from pydantic import SecretStr

from app.core.config import NamedKey, SecuritySettings
from app.core.security import KeyRing
from app.utils.errors import InvalidAPIKeyError

RING = KeyRing(
    SecuritySettings(
        api_key=SecretStr("first-key"),
        api_keys=[NamedKey(name="bob", key=SecretStr("second-key"))],
    )
)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"x-api-key": "first-key"}, "default"),
        ({"x-api-key": "second-key"}, "bob"),
        ({"authorization": "Bearer second-key"}, "bob"),
        ({"authorization": "bearer   first-key "}, "default"),
    ],
)
def test_a_known_key_names_its_caller(headers: dict[str, str], name: str) -> None:
    """Either header works, and the name is the key's own."""
    assert RING.authenticate(headers).name == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "first-ke"},
        {"x-api-key": "first-key "},
        {"x-api-key": "FIRST-KEY"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer"},
        {"authorization": "first-key"},
        {"x-api-key": "wrong", "authorization": "Bearer first-key"},
        {"x-api-key": "\udcff"},
    ],
)
def test_anything_else_is_refused(headers: dict[str, str]) -> None:
    """A missing, altered or misplaced key is nobody's."""
    with pytest.raises(InvalidAPIKeyError):
        RING.authenticate(headers)


def test_ids_tell_keys_apart_without_showing_them() -> None:
    """A caller's id is stable, differs from key to key, and is not the key."""
    ids = {RING.authenticate({"x-api-key": k}).key_id for k in ("first-key", "second-key")}
    assert len(ids) == 2
    assert all(len(i) == 16 and "key" not in i for i in ids)
