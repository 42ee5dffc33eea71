"""API keys: which are accepted, from which header, and whose they are."""

import hashlib

import pytest
from pydantic import SecretStr

from app.core.config.security import DEFAULT_API_KEY, NamedKey, SecuritySettings
from app.core.security import KeyRing, Principal
from app.utils.errors import InsufficientScopeError, InvalidAPIKeyError

KEYS = SecuritySettings(
    api_key=SecretStr("first-key"),
    api_keys=[
        NamedKey(name="team", key=SecretStr("second-key")),
        NamedKey(name="naive", key=SecretStr("schlüssel-🔑")),
    ],
)


def key_id(key: str) -> str:
    """The id of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "key"),
    [("default", "first-key"), ("team", "second-key"), ("naive", "schlüssel-🔑")],
)
def test_each_key_is_its_own_caller(name: str, key: str) -> None:
    """Every configured key is accepted with its name, and its id depends on the key alone."""
    principal = KeyRing(KEYS).authenticate({"x-api-key": key})
    scopes = {"infer", "metrics", "admin"} if name == "default" else {"infer"}
    assert principal == Principal(name=name, key_id=key_id(key), scopes=frozenset(scopes))  # type: ignore[arg-type]


def test_the_id_survives_a_rename() -> None:
    """A renamed key keeps its id, and with it its sessions."""
    renamed = SecuritySettings(api_keys=[NamedKey(name="new", key=SecretStr("second-key"))])
    principal = KeyRing(renamed).authenticate({"x-api-key": "second-key"})
    assert (principal.name, principal.key_id) == ("new", key_id("second-key"))


def test_the_id_does_not_show_the_key() -> None:
    """The principal, which caches and stores hold, does not contain the key."""
    principal = KeyRing(KEYS).authenticate({"x-api-key": "first-key"})
    assert "first" not in repr(principal)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer first-key"},
        {"authorization": "BEARER  first-key "},
        {"authorization": "\t Bearer \tfirst-key\t "},
        {"x-api-key": "first-key "},
        {"x-api-key": " \tfirst-key\t\t "},
        {"x-api-key": " \t", "authorization": "Bearer first-key"},
        {"x-api-key": "first-key", "authorization": "Bearer wrong"},
    ],
)
def test_a_bearer_token_is_a_key_and_x_api_key_goes_first(headers: dict[str, str]) -> None:
    """Bearer is read where X-API-Key is missing; blanks around a header's value do not count."""
    assert KeyRing(KEYS).authenticate(headers).name == "default"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"x-api-key": "first-key\u00a0"},
        {"authorization": "Bearer first-key\u00a0"},
        {"x-api-key": "FIRST-KEY"},
        {"x-api-key": "first-ke"},
        {"x-api-key": "first-key\udcff"},
        {"x-api-key": "x" * 1_000_000},
        {"x-api-key": "wrong", "authorization": "Bearer first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer wrong"},
    ],
)
def test_anything_else_is_refused(headers: dict[str, str]) -> None:
    """A missing, wrong, cut, padded or badly encoded key is rejected by the same error."""
    with pytest.raises(InvalidAPIKeyError) as caught:
        KeyRing(KEYS).authenticate(headers)
    assert caught.value.message == InvalidAPIKeyError.default_message


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each known key is compared once, as a digest, by hmac, whichever key matches."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(known: bytes, presented: bytes) -> bool:
        compared.append((known, presented))
        return known == presented

    ring = KeyRing(KEYS)
    monkeypatch.setattr("app.core.security.hmac.compare_digest", compare)
    for key in ("first-key", "second-key", "wrong"):
        compared.clear()
        try:
            ring.authenticate({"x-api-key": key})
        except InvalidAPIKeyError:
            assert key == "wrong"
        assert len(compared) == 3
        assert {len(known) for known, _ in compared} == {32}
        assert {presented for _, presented in compared} == {hashlib.sha256(key.encode()).digest()}


def test_the_ring_keeps_no_key() -> None:
    """The ring holds digests only, so that a dump of it shows no key."""
    assert "first-key" not in repr(vars(KeyRing(KEYS)))


# --- Digests, scopes, and keys that change --------------------------------------------------------


def ring(*keys: NamedKey) -> KeyRing:
    """A ring of these keys only."""
    return KeyRing(SecuritySettings(api_keys=list(keys)))


def test_a_digest_stands_for_its_key() -> None:
    """A key configured by its digest gives the same principal as the key itself."""
    as_key = NamedKey(name="a", key=SecretStr("a key"))
    as_digest = NamedKey(name="a", digest=f"sha256:{hashlib.sha256(b'a key').hexdigest()}")
    headers = {"x-api-key": "a key"}
    assert ring(as_digest).authenticate(headers) == ring(as_key).authenticate(headers)
    with pytest.raises(InvalidAPIKeyError):
        # The digest itself is no key.
        ring(as_digest).authenticate({"x-api-key": str(as_digest.digest)})


def test_the_default_key_counts_only_while_it_is_alone() -> None:
    """The default key is accepted only while it is the only key."""
    default = {"x-api-key": DEFAULT_API_KEY}
    assert KeyRing(SecuritySettings()).authenticate(default).name == "default"
    with pytest.raises(InvalidAPIKeyError):
        ring(NamedKey(name="a", key=SecretStr("a key"))).authenticate(default)


def test_a_scope_is_required_by_name() -> None:
    """A key has its configured scopes only; no scope implies another."""
    admin = ring(NamedKey(name="a", key=SecretStr("k"), scopes=["admin"])).principals[0]
    admin.require("admin")
    for scope in ("infer", "metrics"):
        with pytest.raises(InsufficientScopeError, match=scope):
            admin.require(scope)


def test_replaced_keys_are_out_at_once() -> None:
    """After a replacement only the new keys are accepted, and a key that stays keeps its id."""
    stays = NamedKey(name="stays", key=SecretStr("stays"))
    goes = NamedKey(name="goes", key=SecretStr("goes"))
    keys = ring(stays, goes)
    before = keys.authenticate({"x-api-key": "stays"})
    limited = stays.model_copy(update={"daily_tokens": 5})
    keys.replace(SecuritySettings(api_keys=[limited]))
    assert keys.authenticate({"x-api-key": "stays"}).key_id == before.key_id
    assert [p.daily_tokens for p in keys.principals] == [5]
    assert keys.find(key_id("goes")) is None
    with pytest.raises(InvalidAPIKeyError):
        keys.authenticate({"x-api-key": "goes"})
