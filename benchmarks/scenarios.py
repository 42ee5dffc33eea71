"""The measurements of a server."""

import asyncio
import itertools
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgspec

from app.llm.client.process import engine_environment
from benchmarks.load.results import Outcome, Result, result_of, summarise
from benchmarks.load.rounds import run_round
from benchmarks.load.targets import Target
from benchmarks.load.transport import HttpClient
from benchmarks.load.workload import Lengths, PlannedRequest, Workload
from benchmarks.paths import LOGS, ROOT
from benchmarks.servers import Row, Server, StartError, environment_of

# Requests a client in a round, so many that filling and draining the batch matter little.
REQUESTS_A_CLIENT = {1: 8, 8: 4}
OUTPUT_TOKENS = 32
LONG_PROMPT_WORDS = 7_800
HISTORY_WORDS = 1_000


def requests_of(clients: int) -> int:
    """Number of requests of a round by number of clients."""
    return clients * REQUESTS_A_CLIENT.get(clients, 3)


async def throughput(server: Server, clients: int, name: str) -> dict[str, Any]:
    """Run a round of a closed loop; its name decides the prompts, which all servers get."""
    results = await run_round(
        server.target, Workload(), name=name, requests=requests_of(clients), clients=clients
    )
    return summarise(results)


class EngineAlone:
    """A process that drives an engine of this service without HTTP.

    Args:
        row: The row of this service whose engine is loaded.

    Raises:
        StartError: The engine cannot be loaded.
    """

    def __init__(self, row: Row) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        # The service starts its engine process with the same environment.
        environment = engine_environment(environment_of(row))
        with (LOGS / "engine-alone.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_alone"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise StartError(f"the engine alone ended with status {self._process.wait()}")
        figures: dict[str, Any] = msgspec.json.decode(line)
        return figures

    def round(self, clients: int, name: str) -> dict[str, Any]:
        """Run the load of :func:`throughput`; figures of the same shape."""
        words = (name, requests_of(clients), clients, OUTPUT_TOKENS)
        if self._process.stdin:
            self._process.stdin.write("\t".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        figures = self._read()
        return {
            "tokens_per_second": figures["tokens"] / figures["seconds"],
            "ttft": {"p50": statistics.median(figures["ttft"])},
        }

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


async def _ask(http: HttpClient, target: Target, prompt: str, max_tokens: int) -> Result:
    body = target.body(PlannedRequest(prompt, max_tokens))
    return result_of(await http.post(target.path, body, target.headers))


async def follow_up(server: Server, rounds: int) -> dict[str, float]:
    """Median TTFT of a first turn of 1,000 tokens, and of a short second turn of its session.

    Raises:
        RuntimeError: A turn failed.
    """
    http = HttpClient(server.target.base_url, time_limit=300)
    workload = Workload(prompt_words=Lengths((HISTORY_WORDS,)))
    first, second = [], []
    for number, request in enumerate(workload.plan(rounds, round_name="follow-up")):
        extra = {"session_id": f"bench-{number}"}
        session = replace(server.target, system=None, extra=extra)
        turns = [
            await _ask(http, session, request.prompt, 16),
            await _ask(http, session, "Go on with the story, please.", 16),
        ]
        if any(turn.outcome is not Outcome.COMPLETED or turn.ttft is None for turn in turns):
            raise RuntimeError(f"a turn failed: {[turn.error for turn in turns]}")
        first.append(turns[0].ttft or 0.0)
        second.append(turns[1].ttft or 0.0)
    http.close()
    return {
        "first_ttft": statistics.median(first),
        "second_ttft": statistics.median(second),
    }


async def cache_hit(server: Server, count: int) -> dict[str, float]:
    """Median latency of an answer from the response cache and of ``/livez``, alternating.

    Raises:
        RuntimeError: A status was not 200.
    """
    http = HttpClient(server.target.base_url, time_limit=60)
    body = msgspec.json.encode(
        {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 16,
            "temperature": 0,
        }
    )
    hits, probes = [], []
    for _ in range(count):
        hit = await http.post(server.target.path, body, server.target.headers)
        probe = await http.get("/livez")
        if hit.status != 200 or probe.status != 200:
            raise RuntimeError(f"the statuses were {hit.status} and {probe.status}")
        hits.append(hit.ended_at - hit.sent_at)
        probes.append(probe.ended_at - probe.sent_at)
    http.close()
    # The first answer was generated, and filled the cache.
    return {"hit": statistics.median(hits[1:]), "livez": statistics.median(probes[1:])}


async def long_prompt_gap(server: Server, *, streams: int, words: int) -> dict[str, Any]:
    """Longest gap of running streams while a long prompt is processed.

    ``streams`` run until the answer to the long prompt, of so many ``words``, has ended.
    """
    http = HttpClient(server.target.base_url, time_limit=300)
    prompts = itertools.count()
    ended = asyncio.Event()
    results: list[Result] = []

    async def stream() -> None:
        while not ended.is_set():
            [request] = Workload(output_tokens=Lengths((256,))).plan(
                1, round_name=f"gap {next(prompts)}"
            )
            results.append(await _ask(http, server.target, request.prompt, request.max_tokens))

    running = [asyncio.ensure_future(stream()) for _ in range(streams)]
    await asyncio.sleep(2.0)
    [long_one] = Workload(prompt_words=Lengths((words,))).plan(1, round_name="long")
    long_result = await _ask(http, server.target, long_one.prompt, 4)
    ended.set()
    await asyncio.gather(*running)
    http.close()
    begin, end = long_result.sent_at, long_result.ended_at
    # A gap counts where any part of it was in the long prompt's time.
    gaps = [
        later - earlier
        for result in results
        for earlier, later in itertools.pairwise(result.text_at)
        if later > begin and earlier < end
    ]
    return {
        "prompt_tokens": long_result.prompt_tokens,
        "worst_gap": max(gaps, default=None),
        "errors": [r.error for r in [long_result, *results] if r.outcome is not Outcome.COMPLETED],
    }
