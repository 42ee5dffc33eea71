"""Fixtures of the engine's tests."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub, Faults, running_hub
from tests.support.hub_processes import (
    DEFAULT_MODEL,
    GOOD_TOKEN,
    OTHER_TOKEN,
    Downloader,
    downloader,
)
from tests.support.tiny_model import make_tiny_model
from tests.support.tokenizer_here import TokenizerHere


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder; copy it before changing it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def _own_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which models have passed the check at the start is recorded in a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("records")))
        yield


@pytest.fixture
def tokenizer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that OpenVINO runs get a tokenizer that this process has read."""
    monkeypatch.setattr("app.llm.engine.openvino.loading.TokenizerProcess", TokenizerHere)


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back() -> Iterator[None]:
    """Return the memory of a module's models to the system."""
    yield
    gc.collect()
    with contextlib.suppress(AttributeError):
        # glibc keeps freed memory unless this is called; other C libraries do not have it.
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def one_hub() -> Iterator[FakeHub]:
    """The fake hub of this module's tests."""
    with running_hub() as server:
        yield server


@pytest.fixture
def hub(one_hub: FakeHub) -> FakeHub:
    """The fake hub, reset."""
    one_hub.repos.clear()
    one_hub.requests.clear()
    one_hub.faults = Faults()
    one_hub.tokens = {GOOD_TOKEN: {"tiny/gated", DEFAULT_MODEL}, OTHER_TOKEN: set()}
    return one_hub


@pytest.fixture(scope="module")
def child(one_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloader]:
    """One downloader for all tests; each test has repositories of its own names."""
    with downloader(tmp_path_factory.mktemp("hub") / "home", one_hub.url) as process:
        yield process
