"""``make test-clients``: ordinary programs of OpenAI-compatible clients against the bundled model.

Each client has an environment in .tools/clients, with the newest releases of its packages. A
program is run there with the service's address; it prints the names of its parts, and fails where
one does. It also has an address at which every other request is refused as overloaded, and leaves a
stream, which the service has to notice. Those in JavaScript need node and npm, and are left out
without them. The exit status is 1 if a program failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Final

import httpx

from app.core.config import PROJECT_ROOT
from tests.support.service import API_KEY, Service, running_service

PYTHON: Final = {
    "litellm": ["litellm"],
    "instructor": ["instructor"],
    "pydantic_ai": ["pydantic-ai-slim[openai]"],
    "openai_agents": ["openai-agents"],
}
JAVASCRIPT: Final = {
    "openai_js": ["openai", "zod"],
    "ai_sdk": ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"],
    "langchain_js": ["@langchain/openai", "@langchain/core", "zod"],
}
"""The packages of each program."""

PROGRAMS: Final = Path(__file__).parent / "programs"
SECONDS: Final = 600


def command(name: str) -> list[str | Path]:
    """How to run a client's program; its environment is made and filled at the first call."""
    home = Path(os.environ.get("CLIENTS_HOME") or PROJECT_ROOT / ".tools" / "clients") / name
    home.mkdir(parents=True, exist_ok=True)
    # A longer list of packages than that of the last time is installed too.
    stamp, packages = home / "installed", " ".join((PYTHON | JAVASCRIPT)[name])
    is_filled = stamp.exists() and stamp.read_text(encoding="utf-8") == packages
    if name in PYTHON:
        python = home / "bin" / "python"
        run: list[str | Path] = [python, PROGRAMS / f"{name}_program.py"]
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", *PYTHON[name]]
        if not python.exists():
            venv.create(home, with_pip=True)
    else:
        # node looks for packages beside the program alone.
        for file in PROGRAMS.glob("*.mjs"):
            shutil.copy(file, home)
        run = ["node", home / f"{name}_program.mjs"]
        install = ["npm", "install", "--silent", "--prefix", home, *JAVASCRIPT[name]]
    if not is_filled:
        subprocess.run(install, check=True)
        stamp.write_text(packages, encoding="utf-8")
    return run


@contextmanager
def busy(service: Service) -> Iterator[str]:
    """The address of a service that refuses the first request and every other one after it."""
    requests = count()
    error = '{"error": {"message": "No place.", "type": "server_error", "code": "overloaded"}}'

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = httpx.Response(503, headers={"Retry-After": "1"}, text=error)
            if next(requests) % 2:
                kept = {"Authorization": self.headers["Authorization"]}
                url = service.base_url + self.path
                answer = httpx.post(url, content=body, headers=kept, timeout=60, trust_env=False)
            self.send_response(answer.status_code)
            for name in ("Content-Type", "Retry-After"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            """Say nothing of requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def succeeds(name: str, service: Service, busy_url: str) -> bool:
    """Run a client's program; returns whether it succeeded."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAMS), "NO_PROXY": "*"}
    variables |= {"CLIENT_URL": f"{service.base_url}/v1", "CLIENT_KEY": API_KEY}
    variables |= {"HOME": str(PROGRAMS.parent), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    variables |= {"CLIENT_BUSY_URL": busy_url}
    left = "llm_requests_cancelled_total"
    before = service.metric(left)
    done = subprocess.run(command(name), env=variables, timeout=SECONDS, check=False)
    return done.returncode == 0 and service.metric(left) > before


def main() -> int:
    """Run the programs that are named, or all."""
    known = [*PYTHON, *(JAVASCRIPT if shutil.which("npm") else ())]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=", ".join(known))
    names = parser.parse_args().names or known
    with (
        running_service(MODEL__SOURCE="bundled", MODEL__ENGINE="auto") as service,
        busy(service) as busy_url,
    ):
        results = {name: succeeds(name, service, busy_url) for name in names}
    for name, succeeded in results.items():
        print(f"{name}: {'works' if succeeded else 'FAILED'}")  # noqa: T201 - a command's answer
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
