"""Build, run and check the image: `make test-docker`.

Docker is used if it answers, else podman, which is installed from Debian's packages if necessary.
Without an image registry, Debian's Python replaces the base image. The script needs only the
standard library and curl, so that nothing has to be installed first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.container_engine import DEFAULT_STORE, PROJECT_ROOT, Engine, EngineError, choose_engine
from tests.support.user_commands import CHAT, GENERATE, HEALTH, METRICS, STATUS, STREAM

MAX_IMAGE_BYTES = 1_500_000_000
USER = "10001"
OTHER_USER = "1000650000"
START_SECONDS = 180.0
# A story of 512 tokens takes minutes when other programs use the cores.
CURL_SECONDS = "600"
STOP_SECONDS = 30

# Prints facts about the image's content as JSON.
LOOK_INSIDE = """
import importlib.metadata as m, importlib.util as u, json, os, shutil
print(json.dumps({
    "packages": sorted(d.metadata["Name"].lower() for d in m.distributions()),
    "torch": m.version("torch"),
    "pip": u.find_spec("pip") is not None,
    "tools": [t for t in ("gcc", "cc", "make", "git", "curl", "pip", "pip3") if shutil.which(t)],
    "app": sorted(os.listdir("/app")),
    "leftovers": [p for p in ("/etc/pip.conf", "/build", "/opt/tools")
                  if os.path.exists(p)] + os.listdir("/mnt"),
}))
"""

# Writes a tiny random model with heads of a size that vLLM has on a CPU.
MAKE_MODEL = """
import json, pathlib
from tests.support.tiny_model import make_tiny_model
path = make_tiny_model(pathlib.Path("/mnt/model")) / "config.json"
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
path.write_text(json.dumps(json.loads(path.read_text()) | heads))
"""


class Checks:
    """Prints and counts checks."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def check(self, what: str, holds: bool, seen: object = "") -> None:
        """Record a check; `seen` is printed when it failed."""
        self.passed += holds
        self.failed += not holds
        print(f"  {'ok    ' if holds else 'FAILED'} {what}", flush=True)
        if not holds:
            print(f"         saw: {seen}", flush=True)


class Container:
    """A running container of the image."""

    def __init__(self, engine: Engine, name: str, port: int, key: str) -> None:
        self.engine = engine
        self.name = name
        self.port = port
        self.key = key

    def curl(self, command: str) -> str:
        """Run a curl command of the documentation against this container."""
        command = command.replace("localhost:8000", f"localhost:{self.port}")
        command = command.replace("your-api-key-here", self.key)
        words = [word for word in shlex.split(command) if word != "\n"]
        words[1:1] = ["--silent", "--show-error", "--noproxy", "*", "--max-time", CURL_SECONDS]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout or done.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside the container."""
        return self.engine.call("exec", self.name, *command, check=False)

    def logs(self) -> str:
        """The container's output."""
        done = self.engine.call("logs", self.name, check=False)
        return done.stdout + done.stderr

    def wait_until_healthy(self) -> float:
        """Wait until /health reports healthy; the seconds until then.

        Raises:
            EngineError: It is not healthy in time.
        """
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if '"healthy"' in self.curl(HEALTH):
                return time.monotonic() - started
            time.sleep(0.2)
        raise EngineError(f"not healthy within {START_SECONDS:.0f} s:\n{self.logs()}")

    def stop(self) -> tuple[int, float]:
        """Stop the container by SIGTERM; the exit status and the seconds until its end."""
        started = time.monotonic()
        self.engine.call("stop", "--time", str(STOP_SECONDS), self.name)
        seconds = time.monotonic() - started
        state = self.engine.call("inspect", "--format", "{{.State.ExitCode}}", self.name)
        return int(state.stdout), seconds


@contextmanager
def running(engine: Engine, image: str, config: str, *options: str) -> Iterator[Container]:
    """Run the image with a config.yml of this text and as few rights as possible.

    ``options`` are more options of the engine's `run`.
    """
    key = secrets.token_hex(32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    container = Container(engine, f"llm-service-test-{secrets.token_hex(4)}", port, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yml"
        path.write_text(config, encoding="utf-8")
        # The service's user, who is no user of this machine, must be able to read it.
        Path(folder).chmod(0o755)
        try:
            engine.call(
                "run", "-d", *engine.run_options,
                "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL",  # noqa: S108 - the container's
                "--security-opt", "no-new-privileges",
                "-p", f"127.0.0.1:{port}:8000",
                "-e", f"SECURITY__API_KEY={key}",
                "-v", f"{path}:/app/config.yml:ro",
                "--name", container.name,
                *options,
                image,
            )  # fmt: skip
            yield container
        finally:
            engine.call("rm", "--force", "--volumes", container.name, check=False)


def check_metadata(checks: Checks, engine: Engine, image: str) -> list[str]:
    """Check the image's metadata; its health check's command."""
    print("The image's metadata")
    inspected = json.loads(engine.call("image", "inspect", image).stdout)[0]
    config = inspected["Config"]
    health = config.get("Healthcheck") or inspected.get("Healthcheck") or {}
    labels = config["Labels"]
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    checks.check("runs as a user that is not root", config["User"].startswith(USER), config["User"])
    checks.check("stops on SIGTERM", config["StopSignal"] == "SIGTERM", config["StopSignal"])
    checks.check("keeps models in a volume", "/models" in config["Volumes"], config["Volumes"])
    checks.check("is a production environment", "APP__ENVIRONMENT=production" in config["Env"])
    checks.check("has a health check", health.get("Test", [""])[0] == "CMD", health)
    checks.check(
        f"is labelled with version {version}",
        labels["org.opencontainers.image.version"] == version,
        labels,
    )
    size = int(inspected["Size"])
    checks.check("is smaller than 1.5 GB", size < MAX_IMAGE_BYTES, f"{size:,} bytes")
    return [str(word) for word in health["Test"][1:]]


def check_refusals(checks: Checks, engine: Engine, image: str) -> None:
    """Check that the image does not start with a weak key."""
    print("Weak keys")
    short = ["-e", "SECURITY__API_KEY=your_key"]
    for what, key in {"the default key": [], "a short key": short}.items():
        done = engine.call("run", "--rm", *engine.run_options, *key, image, check=False)
        lines = [line for line in done.stderr.splitlines() if "time=" not in line]
        checks.check(f"rejects {what}", done.returncode not in (0, 125, 126, 127), done)
        named = len(lines) == 1 and "SECURITY__API_KEY" in lines[0]
        checks.check("says so in one line that names the setting", named, lines)


def check_inside(checks: Checks, container: Container, health: list[str]) -> None:
    """Check the content of the running container."""
    print("Inside the container")
    looked = container.run("python", "-c", LOOK_INSIDE)
    if looked.returncode:
        raise EngineError(f"cannot look into the container: {looked.stderr}")
    seen = json.loads(looked.stdout)
    gpu = [p for p in seen["packages"] if re.match(r"nvidia-|cuda-|triton", p)]
    checks.check("torch is its CPU build", seen["torch"].endswith("+cpu"), seen["torch"])
    checks.check("no CUDA packages", not gpu, gpu)
    base_pip = container.run("/usr/local/bin/python", "-m", "pip", "--version")
    checks.check("no pip", not seen["pip"] and base_pip.returncode != 0, base_pip.stdout)
    checks.check("no build tools", not seen["tools"], seen["tools"])
    checks.check("nothing left of the build", not seen["leftovers"], seen["leftovers"])
    belongs = ["LICENSE", "app", "config.yml"]
    checks.check("/app has the expected files", seen["app"] == belongs, seen["app"])
    uid = container.run("id", "-u").stdout.strip()
    checks.check("its processes are not root's", uid == USER, uid)
    first = container.run("cat", "/proc/1/cmdline").stdout.split("\0")
    checks.check("the server is process 1, so signals reach it", "app.main:app" in first, first)
    model_cache = container.run("touch", "/models/probe").returncode
    own_code = container.run("touch", "/app/app/probe").returncode
    checks.check("can write the model cache, and not its own code", model_cache == 0 != own_code)
    checked = container.run("llm-service", "check")
    checks.check("llm-service check accepts it", checked.returncode == 0, checked.stderr)
    probe = container.run(*health)
    checks.check("the health check's command succeeds", probe.returncode == 0, probe.stderr)


def check_examples(checks: Checks, container: Container, model: str) -> None:
    """Check that the documentation's commands give the documented answers."""
    print("The documentation's curl commands")
    health = _json(container.curl(HEALTH))
    expected = {"status": "healthy", "model_loaded": True, "model_name": model}
    checks.check("/health, with the mounted config.yml's model", health == expected, health)
    generated = _json(container.curl(GENERATE))
    fields = {"generated_text", "prompt", "model", "tokens_generated", "cached"}
    complete = fields <= generated.keys() and generated["tokens_generated"] > 0
    checks.check("/v1/generate", complete, generated)
    answer = _json(container.curl(CHAT))
    fields = {"message", "model", "tokens_generated", "cached"}
    said = answer.get("message", {})
    checks.check("/v1/chat", fields <= answer.keys() and said.get("role") == "assistant", answer)
    text = container.curl(STREAM)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    told = "".join(_json(event).get("delta", {}).get("content", "") for event in events)
    whole = events[-1:] == ["[DONE]"] and bool(told)
    checks.check("/v1/chat streamed", whole, text[-500:])
    refused = _json(container.curl(CHAT.replace("your-api-key-here", "a-wrong-key")))
    code = refused.get("error", {}).get("code")
    checks.check("/v1/chat with a wrong key is rejected", code == "invalid_api_key", refused)
    metrics = container.curl(METRICS)
    names = ("http_requests_total", "tokens_generated_total", "http_request_duration_seconds_count")
    checks.check("/metrics", all(f"\n{name}{{" in metrics for name in names), metrics[:500])


def check_end(checks: Checks, container: Container) -> None:
    """Check that SIGTERM ends the container cleanly, and that every line of its log is JSON."""
    status, seconds = container.stop()
    checks.check(f"SIGTERM ends it cleanly (in {seconds:.1f} s)", status == 0, status)
    lines = [line for line in container.logs().splitlines() if line]
    bad = [line for line in lines if not _json(line)]
    checks.check("every line of the log is JSON", bool(lines) and not bad, bad[:3])


def check_model(checks: Checks, container: Container) -> None:
    """Check an answer of the bundled model."""
    exact = CHAT.replace("0.7", "0")
    answer = _json(container.curl(exact))
    content = answer.get("message", {}).get("content", "")
    checks.check("the bundled model names Paris", "Paris" in content, answer)
    seen = _json(container.curl(STATUS)).get("engine", {})
    checks.check("OpenVINO runs it", seen.get("backend") == "openvino", seen)


def check_unwritable_models(checks: Checks, engine: Engine, image: str) -> None:
    """Check users and volumes that may read the models and not write them."""
    volume = f"llm-service-test-{secrets.token_hex(4)}"
    ways = {
        "another user, as on OpenShift": ["--user", f"{OTHER_USER}:0"],
        "another user and group": ["--user", f"{OTHER_USER}:{OTHER_USER}"],
        # The run before has filled the volume from the image.
        "a read-only volume": ["-v", f"{volume}:/models:ro"],
    }
    try:
        engine.call("run", "--rm", *engine.run_options, "-v", f"{volume}:/models", image, "true")
        for what, options in ways.items():
            with running(engine, image, "model: {source: bundled}\n", *options) as container:
                print(f"With {what} it is ready after {container.wait_until_healthy():.1f} s")
                check_model(checks, container)
    finally:
        engine.call("volume", "rm", "--force", volume, check=False)


def _json(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


def show_sizes(engine: Engine, image: str, container: Container) -> None:
    """Print the size of the image by layer, and its biggest packages."""
    print("Size by layer")
    form = "{{.Size}}\t{{.CreatedBy}}"
    history = engine.call("history", "--no-trunc", "--format", form, image).stdout
    for line in history.splitlines():
        size, _, made_by = line.partition("\t")
        if not size.startswith("0"):
            print(f"  {size:>9}  {made_by.split('#(nop)')[-1].strip()[:80]}")
    inspected = json.loads(engine.call("image", "inspect", image).stdout)[0]
    print(f"  {int(inspected['Size']) / 1e6:6.0f} MB  in all")
    print("Biggest packages (MB)")
    listing = "du -sm /opt/venv/lib/python3*/site-packages/* | sort -rn | head -n 8"
    for line in container.run("sh", "-c", listing).stdout.splitlines():
        megabytes, path = line.split("\t")
        print(f"  {megabytes:>6}  {Path(path).name}")


def check_vllm(checks: Checks, engine: Engine, image: str) -> None:
    """Check that vLLM answers, with a tiny random model that the image's own Python makes."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        tests = f"{PROJECT_ROOT / 'tests'}:/app/tests:ro"
        made = [*engine.run_options, "-v", f"{folder}:/mnt", "-v", tests, image]
        engine.call("run", "--rm", *made, "python", "-c", MAKE_MODEL)
        config = "model: {engine: vllm, source: local, name: /mnt/model}\n"
        with running(engine, image, config, "-v", f"{folder}:/mnt:ro") as container:
            print(f"vLLM is ready after {container.wait_until_healthy():.1f} s")
            answer = _json(container.curl(GENERATE))
            checks.check("vLLM answers", answer.get("tokens_generated", 0) > 0, answer)
            seen = _json(container.curl(STATUS)).get("engine", {})
            checks.check("vLLM runs it", seen.get("backend") == "vllm", seen)
            check_end(checks, container)


def test_image(checks: Checks, engine: Engine, image: str, variant: str) -> None:
    """Run all checks of an image."""
    if variant == "vllm-cpu":
        check_vllm(checks, engine, image)
        return
    health = check_metadata(checks, engine, image)
    check_refusals(checks, engine, image)
    # What engine and model run is said by the mounted file alone, so its effect proves the mount.
    with running(engine, image, "model: {engine: echo}\n") as container:
        print(f"The echo engine is ready after {container.wait_until_healthy():.1f} s")
        check_inside(checks, container, health)
        check_examples(checks, container, "echo")
        show_sizes(engine, image, container)
        check_end(checks, container)
    with running(engine, image, "model: {source: bundled}\n") as container:
        print(f"The bundled model is ready after {container.wait_until_healthy():.1f} s")
        check_model(checks, container)
        check_examples(checks, container, "SmolLM2-135M-Instruct")
        check_end(checks, container)
    check_unwritable_models(checks, engine, image)


def main() -> int:
    """Build, check, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="llm-fastapi-service:latest", help="name to build")
    parser.add_argument("--variant", choices=("cpu", "vllm-cpu"), default="cpu")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="podman's images")
    arguments = parser.parse_args()
    checks = Checks()
    try:
        engine = choose_engine(arguments.store)
        print(f"Building {arguments.image} with {engine.name}", flush=True)
        started = time.monotonic()
        engine.build(arguments.image, {"VARIANT": arguments.variant})
        print(f"Built in {time.monotonic() - started:.0f} s")
        test_image(checks, engine, arguments.image, arguments.variant)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed or not checks.passed else 0


if __name__ == "__main__":
    sys.exit(main())
