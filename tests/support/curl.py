"""Running the curl commands of a page as they are written."""

import subprocess
from dataclasses import dataclass

from tests.support.service import API_KEY, Service

# Put in front of a command so that it runs as it is written; the status comes last.
_CURL = (
    'curl() {{ command curl --silent --show-error --noproxy "*" --max-time {seconds} '
    "--write-out '\\n%{{http_code}}' \"$@\"; }}\n"
)


@dataclass(frozen=True)
class Answered:
    """What a command gave."""

    status: int
    body: str


def run_curl(service: Service, command: str, *, seconds: int = 100) -> Answered:
    """Run a command through bash; only the address and the key are replaced by the service's."""
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
