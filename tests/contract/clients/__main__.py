"""``make test-clients``: ordinary programs of OpenAI-compatible clients against the bundled model.

Each client has an environment in .tools/clients, with the newest releases of its packages. A
program is run there with the service's address; it prints the names of its parts, and fails where
one does. Those in JavaScript need node and npm, and are left out without them. The exit status is 1
if a program failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

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
        run: list[str | Path] = [home / "bin" / "python", PROGRAMS / f"{name}_program.py"]
        install: list[str | Path] = [run[0], "-m", "pip", "install", "--quiet", *PYTHON[name]]
        if not is_filled:
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


def succeeds(name: str, service: Service) -> bool:
    """Run a client's program; returns whether it succeeded."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAMS), "NO_PROXY": "*"}
    variables |= {"CLIENT_URL": f"{service.base_url}/v1", "CLIENT_KEY": API_KEY}
    variables |= {"HOME": str(PROGRAMS.parent), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command(name), env=variables, timeout=SECONDS, check=False)
    return done.returncode == 0


def main() -> int:
    """Run the programs that are named, or all."""
    known = [*PYTHON, *(JAVASCRIPT if shutil.which("npm") else ())]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=", ".join(known))
    names = parser.parse_args().names or known
    with running_service(MODEL__SOURCE="bundled", MODEL__ENGINE="auto") as service:
        results = {name: succeeds(name, service) for name in names}
    for name, succeeded in results.items():
        print(f"{name}: {'works' if succeeded else 'FAILED'}")  # noqa: T201 - a command's answer
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
