"""The echo backend: repeats the prompt, without a model; for tests, load tests and demonstrations.

It answers a chat with its last user message, and a bare prompt with the prompt, one token a step,
repeated as often as ``min_tokens`` wants. A token is one byte of UTF-8, so a character outside
ASCII spans several tokens. A prompt can ask for a fault:

=================  ==============================================================
``[echo:fault]``   this request fails, the others go on
``[echo:raise]``   the step raises, as a broken backend would
``[echo:crash]``   the engine process is killed by a signal, as by a segmentation fault
``[echo:poison]``  the same, before this request has got any token
``[echo:log]``     the step logs more than the log's queue holds
``[echo:write]``   the step writes a thousand lines to standard error, as a library might
``[echo:hang]``    the step never returns, and uses no processor
``[echo:spin]``    the step never returns, and uses the processor
=================  ==============================================================
"""

import os
import signal
import time
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from app.core.log_queue import MAX_LINES
from app.core.logging import get_logger
from app.llm.protocol import (
    SAMPLING_FIELDS,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)

log = get_logger("engine")

CONTEXT_LENGTH = 8192
WRITTEN_LINES = 1000
"""Lines of ``[echo:write]``."""
LAST_WORDS = "the echo engine was asked to crash"
_START, _END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """A tokenizer of 256 bytes and ChatML's two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (_START, _END)])
    return tokenizer


@dataclass
class _Running:
    """A request, its answer, and how many of the answer's tokens have been generated."""

    request: GenerationRequest
    answer: list[int]
    fault: str | None
    generated: int = 0


class EchoBackend:
    """A deterministic stand-in for a model: see the module's docstring."""

    def __init__(self, *, step_seconds: float = 0.0) -> None:
        self._step_seconds = step_seconds
        self._tokenizer = build_tokenizer()
        ids = self._tokenizer.get_vocab()
        self._start_id, self._end_id = ids[_START], ids[_END]
        # A special token that is spelt out in the text stays text.
        self._tokenizer.encode_special_tokens = True
        self._running: dict[str, _Running] = {}
        self.info = EngineInfo(
            model="echo",
            revision=None,
            backend="echo",
            backend_reason="model.engine is echo",
            device="cpu",
            dtype="none",
            context_length=CONTEXT_LENGTH,
            vocabulary_size=self._tokenizer.get_vocab_size(),
            supported=frozenset((*SAMPLING_FIELDS, "logprobs", "top_logprobs")),
            tokenizer_json=self._tokenizer.to_str(),
            chat_template=_CHAT_TEMPLATE,
            special_tokens={"eos_token": _END},
        )

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step's batch."""
        text = self._last_user_message(request.prompt_token_ids)
        fault = text.partition("[echo:")[2].partition("]")[0] or None
        answer = self._tokenizer.encode(text, add_special_tokens=False).ids
        if least := min(request.sampling.min_tokens, request.max_tokens):
            answer = answer or self._tokenizer.encode(" ").ids
            answer *= -(-least // len(answer))
        answer.append(self._end_id)
        self._running[request.id] = _Running(request, answer, fault)

    def _last_user_message(self, prompt: list[int]) -> str:
        if self._start_id not in prompt:
            return self._decode(prompt)
        messages: list[list[int]] = []
        for token in prompt:
            if token == self._start_id:
                messages.append([])
            elif messages and token != self._end_id:
                messages[-1].append(token)
        texts = [self._decode(message) for message in messages]
        users = [text for text in texts if text.startswith("user\n")]
        # The template writes a newline after each message's end token.
        return users[-1].removeprefix("user\n").removesuffix("\n") if users else ""

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        self._running.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        """Generate one token of every answer."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        return [self._advance(running) for running in list(self._running.values())]

    def _advance(self, running: _Running) -> TokenEvent:
        request = running.request
        if running.fault == "fault":
            del self._running[request.id]
            return TokenEvent(request_id=request.id, finish_reason="error", error="asked for")
        if running.fault == "poison":
            _break("crash")
        if (
            running.fault in ("raise", "crash", "log", "write", "hang", "spin")
            and running.generated == 3
        ):
            _break(running.fault)
        token = running.answer[running.generated]
        running.generated += 1
        at_end = token == self._end_id
        finish: FinishReason | None = None
        if at_end or running.generated >= request.max_tokens:
            finish = "stop" if at_end else "length"
            del self._running[request.id]
        # Each token has the probability 1.
        return TokenEvent(
            request_id=request.id,
            token_ids=[token],
            logprobs=[0.0] if request.logprobs else [],
            top_logprobs=[[(token, 0.0)]] if request.top_logprobs else [],
            finish_reason=finish,
        )

    def has_work(self) -> bool:
        """Whether any answer is unfinished."""
        return bool(self._running)

    def stats(self) -> EngineStats:
        """Figures of the moment; there is no KV cache."""
        return EngineStats(running=len(self._running))


def _break(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("the prompt asked for it")
    if fault == "crash":
        # Native libraries write like this, without the logger.
        os.write(2, f"{LAST_WORDS}\n\n{LAST_WORDS}".encode())
        os.kill(os.getpid(), signal.SIGSEGV)
    while fault == "spin":
        pass
    if fault == "write":
        os.write(2, b"the prompt asked for it\n" * WRITTEN_LINES)
        return
    if fault == "log":
        for _ in range(2 * MAX_LINES):
            log.warning("the prompt asked for it")
        return
    time.sleep(1_000_000)
