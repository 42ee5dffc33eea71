"""The user's document and design card: names in the environment, commands, files, packages.

Its config.yml and .env themselves are in tests/test_config.py, its start command with --reload in
tests/api/test_reload.py.
"""

import os
import re
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.core.config import PROJECT_ROOT, load_settings
from app.main import create_app
from tests.conftest import RunApp, running_app
from tests.support.service import (
    API_KEY,
    OTHER_KEY,
    running_service,
)
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.tiny_model import make_tiny_model

NEW_KEY = "a-key-from-the-environment"
PROMPT = {"prompt": "hello", "max_tokens": 5}

# The design card's packages and top level, and the document's project structure.
PACKAGES = (
    *("fastapi", "uvicorn", "pydantic", "pydantic-settings", "pyyaml", "python-dotenv"),
    *("transformers", "torch", "langchain", "langchain-huggingface", "prometheus-client"),
    *("python-json-logger", "cachetools", "slowapi", "sse-starlette", "pytest", "httpx"),
)
FILES = (
    *("app/api/routers/chat.py", "app/api/routers/health.py", "app/api/routers/inference.py"),
    *("app/api/dependencies.py", "app/api/schemas.py"),
    *("app/core/cache.py", "app/core/config/__init__.py", "app/core/logging.py"),
    *("app/core/rate_limit.py", "app/core/security.py"),
    *("app/llm/chain.py", "app/llm/loader.py", "app/llm/prompts/base_system.txt"),
    *("app/utils/errors.py", "app/utils/timing.py", "app/main.py"),
    *("tests/test_config.py", "tests/test_inference.py", "config.yml", ".env.example"),
    *("pyproject.toml", "poetry.lock", "Dockerfile", "Makefile", "README.md"),
)
MAKE = {
    "run": "uvicorn app.main:app --host 0.0.0.0 --port 8000",
    "test": "pytest tests/ -v --cov=app --cov-report=term-missing",
    "lint": "ruff check",
    "format": "ruff format",
    "type-check": "mypy",
    "check-all": "pytest tests/",
    "build-docker": "docker build -t llm-fastapi-service:latest .",
    "run-docker": "docker run -d -p 8000:8000 --name llm-service llm-fastapi-service:latest",
    "logs": "docker logs -f llm-service",
}


@pytest.fixture
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def generate(client: TestClient, **fields: Any) -> Any:
    """The answer to a short prompt."""
    return client.post("/v1/generate", json={**PROMPT, **fields})


# --- What each name in .env and the environment does ---------------------------------------------


def test_the_rate_limit_can_be_adjusted_in_env(tmp_path: Path) -> None:
    """Adjusted in .env, 50 requests a minute with a burst of 100 are the limits in force."""
    (tmp_path / ".env").write_text(
        "RATE_LIMIT__REQUESTS_PER_MINUTE=50\nRATE_LIMIT__BURST_SIZE=100\nSECURITY__API_KEY=k\n"
    )
    app = create_app(load_settings(env_file=tmp_path / ".env"))
    limits = TestClient(app).get("/status", headers={"X-API-Key": "k"}).json()["limits"]
    assert (limits["requests_per_minute"], limits["burst_size"]) == (50, 100)


@contextmanager
def configured(environment: dict[str, str]) -> Iterator[TestClient]:
    """An application that was started with these variables in its environment."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            client = stack.enter_context(running_app())
        yield client


@pytest.fixture(scope="module")
def small() -> Iterator[TestClient]:
    """An application with another key, a small cache and short answers."""
    environment = {
        "SECURITY__API_KEY": NEW_KEY,
        "CACHE__SIZE": "2",
        "MODEL__MAX_TOKENS": "5",
    }
    with configured(environment) as client:
        client.headers["X-API-Key"] = NEW_KEY
        yield client


@pytest.fixture(scope="module")
def limited() -> Iterator[TestClient]:
    """An application that limits requests and keeps no answers."""
    environment = {
        "RATE_LIMIT__ENABLED": "true",
        "RATE_LIMIT__REQUESTS_PER_MINUTE": "60",
        "RATE_LIMIT__BURST_SIZE": "3",
        "CACHE__ENABLED": "false",
    }
    with configured(environment) as client:
        yield client


def test_security_api_key(small: TestClient) -> None:
    """SECURITY__API_KEY is the key that is let in, and the one it replaces is not."""
    assert (
        small.post("/v1/generate", json=PROMPT, headers={"X-API-Key": API_KEY}).status_code == 401
    )
    assert generate(small).status_code == 200


def test_rate_limit_names(limited: TestClient) -> None:
    """With a burst of 3 at 60 a minute, three requests pass and the fourth waits a second."""
    responses = [generate(limited) for _ in range(4)]
    assert [r.status_code for r in responses] == [200, 200, 200, 429]
    assert responses[0].headers["x-ratelimit-limit"] == "3"
    assert responses[3].headers["retry-after"] == "1"


def test_cache_enabled(limited: TestClient) -> None:
    """With CACHE__ENABLED=false an identical request is generated again."""
    limited.headers["X-API-Key"] = OTHER_KEY
    assert [generate(limited).json()["cached"] for _ in range(2)] == [False, False]


def test_cache_size(small: TestClient) -> None:
    """With CACHE__SIZE=2 the least recently used of three answers is the one that is gone."""
    cached = [generate(small, prompt=p).json()["cached"] for p in "abacab"]
    assert cached == [False, False, True, False, True, False]


def test_what_is_kept_expires(run_app: RunApp) -> None:
    """No answer outlives cache.ttl_seconds, and no session chat_history.ttl_seconds."""
    client = run_app(cache={"ttl_seconds": 0.01}, chat_history={"ttl_seconds": 0.01})
    body = {"session_id": "s", "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(2):
        assert client.post("/v1/chat", json=body).json()["cached"] is False
        time.sleep(0.02)
        assert client.get("/v1/sessions/s").status_code == 404


def test_model_max_tokens(small: TestClient) -> None:
    """MODEL__MAX_TOKENS is the most a request may ask for, and what it gets without asking."""
    answer = small.post("/v1/generate", json={"prompt": "a long prompt"}).json()
    assert (answer["tokens_generated"], answer["finish_reason"]) == (5, "length")
    refused = generate(small, max_tokens=6)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_tokens")


def test_prompt_length(small: TestClient) -> None:
    """A prompt over security.max_prompt_chars, 4000 by default, is refused without being echoed."""
    assert generate(small, prompt="x" * 4000).status_code == 200
    refused = generate(small, prompt="x" * 4001)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "prompt_too_long")
    assert "xxx" not in refused.text


def test_a_local_model(monkeypatch: pytest.MonkeyPatch, run_app: RunApp, tmp_path: Path) -> None:
    """MODEL__SOURCE=local serves the model at the path in MODEL__NAME, on MODEL__DEVICE=cpu."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("MODEL__ENGINE", "auto")
    monkeypatch.setenv("MODEL__SOURCE", "local")
    monkeypatch.setenv("MODEL__NAME", str(path))
    monkeypatch.setenv("MODEL__DEVICE", "cpu")
    client = run_app()
    assert client.get("/health").json()["model_name"] == str(path)
    assert generate(client).json()["model"] == str(path)
    assert client.get("/status").json()["engine"]["device"] == "cpu"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a CUDA device here")
def test_cuda_without_a_device(tmp_path: Path) -> None:
    """With MODEL__DEVICE=cuda and no device the service ends with a line that says what to set."""
    model = str(make_tiny_model(tmp_path / "model"))
    with running_service(
        until="started",
        MODEL__DEVICE="cuda",
        MODEL__ENGINE="transformers",
        MODEL__SOURCE="local",
        MODEL__NAME=model,
    ) as service:
        assert service.process.wait(100) == 3
        assert "MODEL__DEVICE=cpu" in service.raw_log().splitlines()[-1]


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_run_the_documented_commands(target: str) -> None:
    """Each make target of the document runs the command of the document."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.replace("\\\n", " ").splitlines()]
    wanted = MAKE[target].split()
    assert any(_is_part(wanted, line.split()) for line in lines), done.stdout


def _is_part(wanted: list[str], words: list[str]) -> bool:
    """Whether the wanted words stand among these, in order."""
    remaining = iter(words)
    return all(word in remaining for word in wanted)


# --- Files and metadata ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_documents_files_are_there(name: str) -> None:
    """Every file of the document's project structure exists and is not empty."""
    assert (PROJECT_ROOT / name).stat().st_size > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_the_design_cards_packages_are_used(package: str, project: dict[str, Any]) -> None:
    """Each package of the design card is a direct dependency; deptry checks that it is used."""
    declared = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    assert package in {re.split(r"[ (\[;]", line)[0].lower() for line in declared}


def test_python_and_poetry(project: dict[str, Any]) -> None:
    """Python 3.11 and later is supported, and the dependencies are locked by Poetry 2."""
    assert project["project"]["requires-python"].startswith(">=3.11")
    assert project["build-system"]["build-backend"] == "poetry.core.masonry.api"
    lock = (PROJECT_ROOT / "poetry.lock").read_text(encoding="utf-8")
    assert re.match(r"# This file is automatically @generated by Poetry 2\.", lock)


def test_the_dockerfile_has_stages_and_no_root() -> None:
    """The image is built in several stages, the last of which runs as a user that is not root."""
    text = (PROJECT_ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    assert len(stages) > 2
    user = re.findall(r"^USER (\S+)", stages[-1], re.MULTILINE)
    assert user
    assert user[-1].split(":")[0] not in ("root", "0")


def test_routers_are_registered_in_main() -> None:
    """Every router of app/api/routers is registered in app/main.py, as the document's steps say."""
    main = (PROJECT_ROOT / "app" / "main.py").read_text(encoding="utf-8")
    imported = re.search(r"from app\.api\.routers import \(?([\w,\s]+)", main)
    assert imported
    modules = {p.stem for p in (PROJECT_ROOT / "app" / "api" / "routers").glob("[a-z]*.py")}
    assert set(re.findall(r"\w+", imported[1].partition("\n)")[0])) == modules
