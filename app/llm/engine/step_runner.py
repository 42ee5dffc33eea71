"""A step in two halves: the forward pass, which a CUDA graph may repeat, and the choice of tokens.

transformers' own runner captures both halves as one graph. A graph repeats kernels on the same
addresses and no line of Python, so a choice that reads each request's parameters could not be in
it. Here a graph ends with the logits in a buffer of its own, and the choice follows each replay.
On a CPU, and for long prompts, nothing is padded and nothing captured; the halves are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers.generation.continuous_batching import model_runner

from app.core.logging import get_logger
from app.llm.engine.base import Backend, GenerationRequest, SamplingParams

log = get_logger("engine")

# A step of more tokens than requests may run is part of a prompt: its kernels are long enough to
# hide their launches, and their sizes so many that few graphs would ever be used again.
_MOST_TOKENS: Final = 64
# Below these a step takes as long as at them; fewer sizes are fewer graphs.
_FEWEST_TOKENS: Final = 8
_FEWEST_READS: Final = 1024
# Each graph keeps the parameters of some hundred kernels on the device.
_MOST_GRAPHS: Final = 128
# Nats by which the log-probability of a token may differ between two sizes of a step, in 16 bits.
_ROUNDING: Final = 0.25


class StepRunner(model_runner.ModelRunner):  # type: ignore[misc]
    """Runs the steps of transformers' continuous batching.

    Attributes:
        uses_graphs: Whether small steps are captured and replayed.
    """

    def __init__(
        self,
        replaced: model_runner.ModelRunner,
        choose: Callable[[Tensor, Sequence[str]], Tensor],
    ) -> None:
        """Take the place of the runner that transformers has made.

        Args:
            replaced: That runner.
            choose: Gets logits, float32 [rows, vocabulary], which it may change, and the ids of
                the requests that they are of; gives their next tokens, [rows].
        """
        super().__init__(
            logit_processor=replaced.logit_processor,
            cb_config=replaced.cb_config,
            inputs_and_outputs=replaced.inputs_and_outputs,
            cache=replaced.cache,
            do_sample=False,
            return_logprobs=False,
        )
        self._choose = choose
        self.uses_graphs = any(self.cb_config.cuda_graph_booleans)
        self._graphs: dict[tuple[int, ...], Any] = {}
        self._buffer = torch.empty(0)
        self._most_tokens = model_runner.pad_to_pow2(
            self.cb_config.max_requests_per_batch, self.cache.max_batch_tokens, _MOST_TOKENS
        )

    def maybe_pad_inputs(
        self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool
    ) -> tuple[int, int]:
        """Sizes of the coming step: those of a graph where it is to be one, else its own.

        Args:
            num_q_tokens: Its tokens.
            max_kv_read: Tokens that it reads from the cache.
            use_decode_fast_path: Whether attention reads the cache where it lies.

        Returns:
            The first two, padded or not.
        """
        # transformers asks for this after the call, for the same step.
        self.pad_inputs = self.uses_graphs and num_q_tokens <= self._most_tokens
        if not self.pad_inputs or use_decode_fast_path:
            padded: tuple[int, int] = super().maybe_pad_inputs(
                num_q_tokens, max_kv_read, use_decode_fast_path
            )
            return padded
        interval, most = self.cb_config.kv_padding_interval_size, self.cache.max_tokens_read
        # Doubling keeps short contexts cheap; from the interval on it would waste too much.
        reads = (
            model_runner.pad_to_pow2(max_kv_read, most, _FEWEST_READS)
            if max_kv_read <= interval
            else model_runner.pad_to_interval(max_kv_read, interval, most)
        )
        tokens = model_runner.pad_to_pow2(num_q_tokens, self._most_tokens, _FEWEST_TOKENS)
        return tokens, reads

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        """Run a step: the logits by a forward pass or a replay of one, then the choice.

        Args:
            model: The language model.
            batch_data: Its keyword arguments, views of transformers' static inputs.
        """
        if self.supports_logits_to_keep(model):
            batch_data["logits_to_keep"] = batch_data["logits_indices"]
        stream = self.inputs_and_outputs.compute_stream
        if stream is not None:
            # The inputs were copied on the current stream; a replay reads them at once.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with model_runner.stream_context(stream):
            compute = self._replay if self.pad_inputs else self._forward
            self._write(compute(model, batch_data))

    def _forward(self, model: Any, batch_data: dict[str, Any]) -> Tensor:
        """Logits of the places that :meth:`_write` may need, [places, vocabulary]."""
        logits: Tensor = model(**batch_data).logits[0]
        return logits if "logits_to_keep" in batch_data else logits[batch_data["logits_indices"]]

    def _write(self, logits: Tensor) -> None:
        """Choose the next token of each request that gets one, where transformers reads it."""
        io = self.inputs_and_outputs
        names = [r.state.request_id for r in io.requests_in_batch if r.has_new_token]
        if names:
            # The rows after theirs belong to unfinished prompts and to padding.
            rows = len(names)
            io.output_ids[0, :rows] = self._choose(logits[:rows].float(), names)

    def _replay(self, model: Any, batch_data: dict[str, Any]) -> Tensor:
        """As :meth:`_forward`, by the graph of the step's sizes; the first time, capture it."""
        key = self.inputs_and_outputs._get_graph_key()
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return self._buffer
        if len(self._graphs) >= _MOST_GRAPHS:
            return self._forward(model, batch_data)
        return self._capture(key, model, batch_data)

    def _capture(self, key: tuple[int, ...], model: Any, batch_data: dict[str, Any]) -> Tensor:
        # Capturing computes nothing, so this pass is the step's; it also makes what kernels
        # allocate the first time they run.
        with model_runner.memory_pool_context(self.mem_pool):
            logits = self._forward(model, batch_data)
        # Where no other graph writes: what a graph computes lies in memory that all of them share.
        rows, vocabulary = self.cb_config.max_requests_per_batch, logits.shape[-1]
        if not self._buffer.numel():
            self._buffer = logits.new_empty((rows, vocabulary), dtype=torch.float32)
        self._buffer[: logits.shape[0]].copy_(logits)
        del logits
        try:
            graph = model_runner.create_accelerator_graph()
            with model_runner.accelerator_graph_capture_context(
                graph, stream=self.inputs_and_outputs.compute_stream, pool=self.graph_pool_id
            ):
                logits = self._forward(model, batch_data)
                self._buffer[: logits.shape[0]].copy_(logits)
        except Exception as error:  # noqa: BLE001 - any model's own, and the step is done without
            self.give_up_graphs(f"a step could not be captured ({error!r})")
        else:
            self._graphs[key] = graph
        return self._buffer

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Steps of their own sizes, no graphs, for as long as this is open."""
        before, self.uses_graphs = self.uses_graphs, False
        try:
            yield
        finally:
            self.uses_graphs = before

    def give_up_graphs(self, reason: str) -> None:
        """Go on without graphs, and say so in the log."""
        self.uses_graphs = False
        self._graphs.clear()
        log.warning("CUDA graphs are off, decoding is slower: %s", reason)


def try_graphs(backend: Backend, runner: StepRunner) -> None:
    """Before the first request: use graphs only where they give the same answers as plain steps.

    Args:
        backend: What runs ``runner``'s steps; nothing else is under way in it.
        runner: Gives its graphs up, with a warning, where they fail or their answers differ.
    """
    with runner.without_graphs():
        expected = _answers(backend, _trial())
    try:
        # Every size is captured in the first round and replayed in the second.
        for _ in range(2):
            found = _answers(backend, _trial())
            if runner.uses_graphs and not all(map(_agree, expected, found)):
                runner.give_up_graphs("their answers differ from those of plain steps")
        most = runner.cb_config.max_requests_per_batch
        for size in (min(2**i, most) for i in range((most - 1).bit_length() + 1)):
            if runner.uses_graphs:
                # Later, the first batch of a size would wait for its capture.
                _answers(backend, _trial(requests=size, tokens=1, max_tokens=2))
    except Exception as error:  # noqa: BLE001 - any model's own; plain steps go well
        runner.give_up_graphs(f"a padded step failed ({error!r})")
        for request in _trial(requests=runner.cb_config.max_requests_per_batch):
            backend.cancel(request.id)
        while backend.has_work():
            backend.step()


def _trial(requests: int = 3, tokens: int = 6, max_tokens: int = 8) -> list[GenerationRequest]:
    """Greedy requests of different lengths, shorter than a page: none finds another's tokens."""
    greedy = SamplingParams(temperature=0)
    return [
        GenerationRequest(
            f"trial {i}", list(range(tokens + i % 3)), max_tokens, greedy, logprobs=True
        )
        for i in range(requests)
    ]


def _answers(backend: Backend, requests: list[GenerationRequest]) -> list[list[tuple[int, float]]]:
    """Each request's tokens with their log-probabilities.

    Raises:
        RuntimeError: One of them failed.
    """
    answers: dict[str, list[tuple[int, float]]] = {request.id: [] for request in requests}
    for request in requests:
        backend.add(request)
    while backend.has_work():
        for event in backend.step():
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
            answers[event.request_id] += zip(event.token_ids, event.logprobs, strict=True)
    return list(answers.values())


def _agree(expected: list[tuple[int, float]], found: list[tuple[int, float]]) -> bool:
    """Whether two greedy answers are equal, or part at two tokens that are equally likely.

    Kernels for other sizes round differently, so in 16 bits a tie may go either way; what comes
    after it are two different texts.
    """
    for (token, logprob), (other, other_logprob) in zip(expected, found, strict=False):
        if not abs(logprob - other_logprob) <= _ROUNDING:
            return False
        if token != other:
            return True
    return len(expected) == len(found)
