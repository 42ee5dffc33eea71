"""Drives the engine in a loop without HTTP, which is the most that the service could reach.

``python -m benchmarks.engine_alone`` loads the model of the settings. For each line on standard
input (name of the round, requests, concurrent requests, tokens) it writes one line of JSON: tokens,
seconds, and the time to the first token of each request.
"""

import json
import sys
import time
from typing import Any

from app.core.config import load_settings
from app.llm.loader import load_backend
from app.llm.protocol import Backend, GenerationRequest, SamplingParams
from app.llm.tokenizer import PromptTokenizer
from benchmarks.load.workload import Lengths, Workload
from benchmarks.servers import SYSTEM


def drive(backend: Backend, requests: list[GenerationRequest], at_once: int) -> dict[str, Any]:
    """Run ``requests``, at most ``at_once`` at a time; the figures of the round."""
    waiting = list(reversed(requests))
    added: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens = running = 0
    started = time.perf_counter()
    while waiting or running:
        while waiting and running < at_once:
            request = waiting.pop()
            added[request.id] = time.perf_counter()
            backend.add(request)
            running += 1
        events = backend.step()
        now = time.perf_counter()
        for event in events:
            tokens += len(event.token_ids)
            if event.token_ids:
                first.setdefault(event.request_id, now - added[event.request_id])
            if event.finish_reason == "error":
                raise RuntimeError(f"a request failed: {event.error}")
            running -= event.finish_reason is not None
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "ttft": list(first.values())}


def main() -> None:
    """Run rounds until standard input ends."""
    settings = load_settings()
    backend = load_backend(
        settings.model,
        max_running=settings.engine.max_running,
        echo_step_seconds=0.0,
        token=None,
        progress=lambda message, _=None: print(message, file=sys.stderr),
    )
    tokenizer = PromptTokenizer(backend.info)
    print("{}", flush=True)
    for line in sys.stdin:
        name, count, at_once, tokens = line.rstrip("\n").split("\t")
        planned = Workload(output_tokens=Lengths((int(tokens),))).plan(int(count), round_name=name)
        requests = []
        for number, request in enumerate(planned):
            chat = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request.prompt},
            ]
            ids = tokenizer.encode_rendered(tokenizer.render_chat(chat))
            greedy = SamplingParams(temperature=0.0)
            requests.append(GenerationRequest(f"{name} {number}", ids, request.max_tokens, greedy))
        print(json.dumps(drive(backend, requests, int(at_once))), flush=True)
    tokenizer.close()


if __name__ == "__main__":
    main()
