"""Replicas of Ray Serve, on a real Ray of this machine: `make test-ray`."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from app.core.config import PROJECT_ROOT
from tests.support.live import generate
from tests.support.redis_server import redis_server
from tests.support.service import Service, isolated_environment, setting_names
from tests.support.sse import parse

CONFIG = PROJECT_ROOT / "deploy" / "ray" / "serve.yml"
PYTHON = Path(os.environ.get("TEST_RAY", ""), "bin", "python")
START_SECONDS = 300.0

needs_ray = pytest.mark.skipif(not PYTHON.exists(), reason="make test-ray runs it")


@contextlib.contextmanager
def cluster(**settings: str) -> Iterator[Service]:
    """Ray with deploy/ray/serve.yml on a free port: at least one replica, at most two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = {"max_replicas": 2, "target_requests": 2, "cpus": 0.1}
    application["runtime_env"]["env_vars"] |= settings
    environment = isolated_environment({}) | {"RAY_USAGE_STATS_ENABLED": "0"}
    # Names of sockets in it may have 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        file, log_path = Path(folder) / "serve.yml", Path(folder) / "serve.log"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [PYTHON.with_name("serve"), "run", "--app-dir", PROJECT_ROOT, file],
                env={**environment, "RAY_TMPDIR": folder},
                cwd=PROJECT_ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        service = Service(f"http://127.0.0.1:{port}", process, log_path)
        try:
            yield service
        except BaseException as error:
            error.add_note(f"--- Serve's log ---\n{service.raw_log()[-6000:]}")
            raise
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def probed(service: Service) -> str | None:
    """What /readyz says; ``None`` where it is not this service that answers."""
    with contextlib.suppress(httpx.TransportError, ValueError, KeyError, TypeError):
        status: str = service.get("/readyz").json()["status"]
        return status
    return None


def replicas_seen(service: Service) -> set[float]:
    """The replicas that a few requests meet, by when their processes began."""
    return {service.metric("process_start_time_seconds") for _ in range(8)}


@needs_ray
@pytest.mark.timeout(1200)
def test_replicas_are_added_and_share_their_sessions() -> None:
    """No request meets a loading model; under load a second replica comes and knows sessions."""
    with (
        redis_server() as redis,
        cluster(STATE__URL=redis.url, ENGINE__ECHO_STEP_SECONDS="0.2") as service,
    ):
        said: set[str | None] = set()

        def is_ready() -> bool:
            assert service.process.poll() is None, service.raw_log()
            said.add(probed(service))
            return "ready" in said

        service.wait_for(is_ready, "readiness", START_SECONDS)
        assert said <= {None, "ready"}
        assert len(replicas_seen(service)) == 1
        assert "server.* bounds no connections" in service.raw_log()
        text = "x" * 400
        with ThreadPoolExecutor(8) as pool, service.client(timeout=START_SECONDS) as client:
            streams = [
                pool.submit(client.post, "/v1/generate", json=generate(text, stream=True))
                for _ in range(8)
            ]
            service.wait_for(lambda: len(replicas_seen(service)) == 2, "a replica", START_SECONDS)
            session = {"X-Session-ID": "shared"}
            for turn in range(6):
                message = {"role": "user", "content": f"{turn}"}
                body = {"model": "default", "messages": [message]}
                answer = client.post("/v1/chat/completions", json=body, headers=session)
                assert answer.status_code == 200, answer.text
                for _ in range(4):
                    kept = client.get("/v1/sessions/shared").json()["messages"]
                    assert [m["content"] for m in kept[::2]] == [f"{i}" for i in range(turn + 1)]
            for stream in streams:
                answer = stream.result()
                assert parse(answer.text, answer.headers).text == text


@needs_ray
def test_replicas_without_a_shared_state_are_refused() -> None:
    """More than one replica needs Redis, and the error says so."""
    program = "from deploy.ray.replicas import Scale, build; build(Scale(max_replicas={}))"
    refused, taken = (
        subprocess.run(
            [PYTHON, "-c", program.format(number)],
            cwd=PROJECT_ROOT,
            env=isolated_environment({}),
            capture_output=True,
            text=True,
            check=False,
        )
        for number in (2, 1)
    )
    assert refused.returncode == 1
    assert "more than one replica needs state.backend redis" in refused.stderr
    assert taken.returncode == 0, taken.stderr


def test_serves_configuration_names_what_exists() -> None:
    """The variables of deploy/ray/serve.yml are settings, and its program is in deploy/."""
    (application,) = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"]
    assert application["runtime_env"]["env_vars"].keys() <= setting_names().keys()
    module, _, name = application["import_path"].partition(":")
    program = PROJECT_ROOT / f"{module.replace('.', '/')}.py"
    assert f"\ndef {name}(" in program.read_text(encoding="utf-8")
