"""Long-lived objects are excluded from garbage collections in both processes."""

import os
import socket
import subprocess
import sys

from app.core.config import PROJECT_ROOT, ModelSettings
from app.llm.protocol import Configure, pack
from tests.support.service import isolated_environment

TELL = "import gc; print(gc.get_freeze_count(), len(gc.get_objects()), gc.isenabled())"
SERVE = f"""
import asyncio
import app.main
async def main():
    application = app.main.app
    async with application.router.lifespan_context(application):
        while application.state.services.engine.state != "ready":
            await asyncio.sleep(0.01)
        {TELL}
asyncio.run(main())
"""


def objects_of(program: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> tuple[int, int]:
    """The objects that a program's collector ignores, and those that it traverses."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=PROJECT_ROOT,
        env=isolated_environment({"MODEL__ENGINE": "echo"}),
        pass_fds=pass_fds,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    spared, seen, enabled = done.stdout.split()[-3:]
    assert enabled == "True"
    return int(spared), int(seen)


def test_the_api_process_spares_its_libraries() -> None:
    """When the service is ready, collections are on and traverse less than 2 % of all objects."""
    spared, seen = objects_of(SERVE)
    assert spared > 100_000
    assert seen < spared / 50


def test_the_engine_process_spares_its_libraries() -> None:
    """The same holds in the engine process when the model is loaded."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(
            pack(
                Configure(
                    model=ModelSettings(engine="echo").model_dump(),
                    max_running=1,
                    echo_step_seconds=0,
                    huggingface_token=None,
                    log_level="ERROR",
                    log_format="json",
                )
            )
        )
        program = (
            "import os, sys; from app.llm.engine import worker\n"
            f"def run(self): {TELL}; sys.stdout.flush(); os._exit(0)\n"
            "worker.Worker.run = run; worker.main()"
        )
        fd = os.dup(theirs.fileno())
        try:
            spared, seen = objects_of(program, str(fd), "2", pass_fds=(fd,))
        finally:
            os.close(fd)
    assert spared > 10_000
    assert seen < spared / 50
