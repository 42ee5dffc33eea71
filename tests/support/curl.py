"""Runs the curl commands of a page as they are written."""

import subprocess
from dataclasses import dataclass

from tests.support.service import API_KEY, Service

# Put in front of a command. It sets options, and has curl write the status last.
_CURL = (
    'curl() {{ command curl --silent --show-error --noproxy "*" --max-time {seconds} '
    "--write-out '\\n%{{http_code}}' \"$@\"; }}\n"
)


@dataclass(frozen=True)
class Answered:
    """The response that a command printed."""

    status: int
    body: str


def run_curl(service: Service, command: str, *, seconds: int = 100) -> Answered:
    """Run a command in bash, with the address and the key of the service."""
    script = command.replace("http://localhost:8000", service.base_url)
    script = script.replace("your-api-key-here", API_KEY)
    done = subprocess.run(
        ["bash", "-c", _CURL.format(seconds=seconds) + script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return Answered(int(status), body)
