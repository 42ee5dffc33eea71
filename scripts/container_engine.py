"""Builds and runs containers with Docker, or with podman, which has the same commands.

podman needs root, but no running engine. The machine's certificates and pip's settings are mounted
during the build, so that a private package index works; they do not become part of the image.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
STAND_IN = PROJECT_ROOT / "deploy" / "docker" / "stand_in_base.sh"
# Not podman's default store, in which the stand-in would replace the real base image.
DEFAULT_STORE = Path("/var/tmp/llm-fastapi-service-containers")  # noqa: S108 - too big for /tmp, and worth keeping
_PACKAGES = ("podman", "runc", "netavark", "aardvark-dns", "iptables", "debootstrap")
_CERTIFICATES = ("/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")
_ASK_PIP = """
import json
from pip._internal.commands import create_command
options = create_command("download").parser.get_default_values()
print(json.dumps([options.index_url, options.find_links]))
"""


class EngineError(Exception):
    """Containers cannot be built or run; the message has the reason."""


@dataclass(frozen=True)
class Engine:
    """A program that builds and runs containers.

    Attributes:
        name: Name in messages.
        command: First words of every call.
        build_options: Options of `build` on this machine.
        run_options: Options of `run` on this machine.
    """

    name: str
    command: tuple[str, ...]
    build_options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()

    def build(self, tag: str, arguments: Mapping[str, str]) -> None:
        """Build the project's image and show the engine's output.

        Raises:
            EngineError: The build failed.
        """
        pairs = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        command = [*self.command, "build", *self.build_options, *pairs, "--tag", tag, "."]
        if subprocess.run(command, cwd=PROJECT_ROOT, check=False).returncode:
            raise EngineError("the image could not be built")

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine; its output.

        Raises:
            EngineError: It failed and `check` is set.
        """
        done = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise EngineError(f"{self.name} {arguments[0]} failed: {done.stderr.strip()}")
        return done


def choose_engine(store: Path) -> Engine:
    """Docker if it answers, else podman with its images in `store`.

    Raises:
        EngineError: Neither can be used.
    """
    if _answers(["docker", "info"]):
        return Engine("docker", ("docker",))
    _install_podman()
    return _podman(store)


def _answers(command: Sequence[str]) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _install_podman() -> None:
    if os.geteuid() != 0:
        raise EngineError("no Docker engine answers, and podman is used by root only")
    if all(shutil.which(program) for program in ("podman", "runc", "debootstrap")):
        return
    if not shutil.which("apt-get"):
        raise EngineError("no Docker engine answers, and there is no apt-get to install podman")
    print("No Docker engine answers: installing podman", flush=True)
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"podman cannot be installed: {done.stderr.strip()}")


def _podman(store: Path) -> Engine:
    store.mkdir(parents=True, exist_ok=True)
    places = (f"--root={store / 'images'}", f"--runroot={store / 'run'}")
    # By default podman raises limits, which a host that is a container itself is not allowed to do.
    limits = [
        f"--ulimit={name}={most}:{most}"
        for name, most in {
            "nofile": _at_most(4096, resource.RLIMIT_NOFILE),
            "nproc": _at_most(4096, resource.RLIMIT_NPROC),
        }.items()
    ]
    engine = Engine(
        "podman",
        ("podman", *places, "--runtime=runc"),
        # Docker's format, because OCI's has no health check; chroot, because a host that is a
        # container itself may not create the namespaces of build steps.
        ("--isolation=chroot", "--format=docker", "--layers", "--pull=never", *_machine()),
        # podman runs health checks by systemd, which may not run here.
        (*limits, "--no-healthcheck"),
    )
    _provide_base_image(engine)
    return engine


def _at_most(limit: int, kind: int) -> int:
    """The lower of ``limit`` and the process's own limits, so that no limit is raised."""
    return min([limit, *(value for value in resource.getrlimit(kind) if value >= 0)])


def _provide_base_image(engine: Engine) -> None:
    if engine.call("image", "exists", BASE_IMAGE, check=False).returncode == 0:
        return
    if engine.call("pull", "--quiet", BASE_IMAGE, check=False).returncode == 0:
        return
    print("No image registry answers: making a stand-in for the base image", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "base.tar"
        if subprocess.run([str(STAND_IN), str(archive)], check=False).returncode:
            raise EngineError("the stand-in for the base image could not be made")
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        engine.call("import", "--quiet", "--change", f"ENV {path}", str(archive), BASE_IMAGE)


def _machine() -> list[str]:
    """Mounts and arguments that give pip in the build the settings of pip on this machine.

    The mount points are folders of the base image, so that no new folder remains in the image.
    """
    options = [f"--volume={path}:{path}:ro" for path in _CERTIFICATES if Path(path).is_dir()]
    answer = subprocess.run(
        [sys.executable, "-c", _ASK_PIP], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return options
    index, find_links = json.loads(answer.stdout)
    options.append(f"--build-arg=PIP_INDEX_URL={index}")
    for wheels in [Path(link) for link in find_links if Path(link).is_dir()][:1]:
        options += [f"--volume={wheels}:/mnt:ro", "--build-arg=PIP_FIND_LINKS=/mnt"]
        if list(wheels.glob("torch-*+cpu-*.whl")):
            # The CPU build of torch is local, so PyTorch's index need not be reachable.
            options.append("--build-arg=TORCH_INDEX_URL=")
    return options
