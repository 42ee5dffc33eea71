"""Fixtures for all tests: running services, and an environment without settings."""

import gc
import importlib
import logging
import os
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from starlette.testclient import TestClient
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

import app
from app.core.config import Settings, load_settings
from app.core.logging import get_logger
from app.llm.client.process import engine_environment
from app.llm.engine.openvino.loading import keep_telemetry_out
from app.llm.models import bundled
from tests.support.live import STEP
from tests.support.service import (
    API_KEY,
    OTHER_KEY,
    Service,
    is_setting,
    running_service,
)
from tests.support.settings import Load

# As in an engine process. Otherwise torch's threads in this process spin while they wait, and take
# the cores from the service under test (docs/adr/0010). torch reads it once, when it is imported.
os.environ["GOMP_SPINCOUNT"] = engine_environment(os.environ)["GOMP_SPINCOUNT"]
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if _IS_WORKER:
    # There is a test process for each core already; more threads would wait for each other.
    # OpenVINO does not read this variable: with one thread it crashes on a tiny model.
    os.environ["MKL_NUM_THREADS"] = "1"

# An example may be slow on a slow machine. pytest's time limit still holds. Each run has others;
# `make test-full` has more.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=30)
hypothesis.settings.register_profile("full", deadline=None, max_examples=200)
hypothesis.settings.load_profile("full" if "FULL_SIZE" in os.environ else "suite")

RunApp = Callable[..., TestClient]


# Files that load the bundled model, in a service or in the test process.
_BUNDLED = frozenset(
    f"tests/{name}.py"
    for name in (
        "contract/test_openai_clients",
        "contract/test_readme",
        "contract/test_responses_client",
        "contract/test_user_document",
        "engine/test_batch_precision",
        "engine/test_bundled_model",
        "engine/test_grammar_costs",
        "engine/test_random_schemas",
        "test_inference",
    )
)


# Files that start the service with a tiny model.
_TINY = frozenset(
    f"tests/api/test_openai_{name}.py" for name in ("responses", "structured", "tools")
)


class _Together(LoadFileScheduling):  # type: ignore[misc]
    """Gives each file to one test process, and files that share what is costly to the same one.

    The bundled model takes 6 s of processor time to load, the syntax of all files 4 s to read, a
    browser 4 s to start, and a tiny model 3 s.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        folder = file.split("/")[1]
        if folder in ("architecture", "playground"):
            return folder
        if file in _TINY:
            return "tiny"
        return "bundled" if file in _BUNDLED else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Schedule `make test`'s files on its processes; this one runs none, so it measures nothing."""
    gc.enable()
    if coverage := _coverage(config):
        coverage.pause()
    return _Together(config, log)


# What app/ imports and takes longest, and what only other programs import.
_LIBRARIES = ("torch", "transformers.pipelines", "langchain_huggingface", "openvino_genai")
_ELSEWHERE = {"app.__main__", "app.llm.engine.vllm.backend"}


# After pytest-cov's, which begins to measure.
@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Neither look for garbage nor measure while tests are collected: both double that time."""
    gc.disable()
    if _IS_WORKER and (coverage := _coverage(session.config)):
        coverage.pause()
        keep_telemetry_out()
        for name in _LIBRARIES:
            importlib.import_module(name)
        # The collection would import the same, and these lines are measured.
        coverage.resume()
        for module in pkgutil.walk_packages(app.__path__, "app."):
            if module.name not in _ELSEWHERE:
                importlib.import_module(module.name)
        coverage.pause()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the garbage collector what the imports made, which was 4 % of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if _IS_WORKER and (coverage := _coverage(session.config)):
        coverage.resume()


def _coverage(config: pytest.Config) -> Any:
    """What measures the coverage; ``None`` if nothing does."""
    return getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--restarts``, which `make restarts` sets."""
    parser.addoption("--restarts", type=int, default=2, help="rolling restarts under load")


@pytest.fixture(scope="session", autouse=True)
def _environment_without_settings() -> Iterator[None]:
    """Remove a developer's settings from the environment; tests set what they need."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(is_setting, list(os.environ)):
            patch.delenv(name)
        yield


def make_settings(**sections: dict[str, Any]) -> Settings:
    """Settings with the echo engine and the tests' keys; sections replace single values."""
    values: dict[str, Any] = {
        "model": {"engine": "echo"},
        "security": {"api_key": API_KEY, "api_keys": [{"name": "other", "key": OTHER_KEY}]},
        "rate_limit": {"enabled": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Settings(_env_file=None, **values)


@contextmanager
def running_app(**sections: dict[str, Any]) -> Iterator[TestClient]:
    """The application inside this process, with its engine process, once it is ready."""
    # It takes most of a second, and the process that only schedules the tests does without.
    from app.main import create_app

    fatal: list[str] = []
    with restored_logging():
        app = create_app(make_settings(**sections), on_fatal=fatal.append)
        with TestClient(app, headers={"X-API-Key": API_KEY}) as client:
            while client.get("/readyz").status_code != 200:
                assert not fatal, fatal
                time.sleep(0.02)
            yield client


@contextmanager
def restored_logging() -> Iterator[None]:
    """Puts the root logger and the service's back to what they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    service_level = get_logger().level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], root.level = handlers, level
        get_logger().setLevel(service_level)


def flush_log() -> None:
    """Wait until what was logged is written."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def without_key(client: TestClient) -> TestClient:
    """A client of the same application, on the same event loop, without a key."""
    anonymous = TestClient(client.app)
    anonymous.portal = client.portal
    return anonymous


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    """A client of an application inside this process, with the echo engine."""
    with running_app() as client:
        yield client


@pytest.fixture
def run_app() -> Iterator[RunApp]:
    """Runs further applications, with other settings: ``run_app(cache={"enabled": False})``."""
    with ExitStack() as stack:
        yield lambda **sections: stack.enter_context(running_app(**sections))


@pytest.fixture(scope="session")
def echo_service() -> Iterator[Service]:
    """The service under uvicorn, with the echo engine."""
    with running_service() as service:
        yield service


@pytest.fixture(scope="session")
def slow_service() -> Iterator[Service]:
    """The service under uvicorn, with an echo engine that takes 50 ms for a token."""
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP),
        ENGINE__MAX_RESTARTS="1000",
    ) as service:
        yield service


@pytest.fixture(scope="session")
def bundled_service() -> Iterator[Service]:
    """The service under uvicorn, with the bundled model."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here; `make model` fetches it")
    with running_service(MODEL__SOURCE="bundled", MODEL__ENGINE="auto") as service:
        yield service


@pytest.fixture(scope="session")
def tiny_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service under uvicorn, with a random model on OpenVINO that keeps grammars.

    It costs a tenth of the bundled model, for tests that look at the form of an answer alone.
    """
    from tests.support.tiny_gguf import make_tiny_gguf

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    name = str(make_tiny_gguf(path, context=4096))
    with running_service(
        MODEL__SOURCE="local", MODEL__NAME=name, MODEL__ENGINE="openvino"
    ) as service:
        yield service


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads settings from the text of a config.yml and of a .env, and nothing else."""

    def load(config: str = "", env: str = "") -> Settings:
        config_file, env_file = tmp_path / "config.yml", tmp_path / ".env"
        config_file.write_text(config, encoding="utf-8")
        env_file.write_text(env, encoding="utf-8")
        return load_settings(config_file=config_file, env_file=env_file)

    return load
