"""An engine without a process that answers by a script, and tokenizers of reasoning models."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from msgspec import structs
from tokenizers import AddedToken, Tokenizer

from app.core.config.engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.answer_text import TextPiece
from app.llm.client.admission import RequestQueue
from app.llm.client.client import EngineClient
from app.llm.client.place import Place
from app.llm.engine.echo import EchoBackend
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.protocol import EngineInfo, GenerationRequest, TokenEvent
from app.llm.tokenizer import PromptTokenizer
from tests.data.reasoning_templates import Spoken

INFO = EchoBackend().info
END = "<|im_end|>"


@cache
def described(
    template: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()
) -> EngineInfo:
    """A model with a token for each byte, ChatML's tokens, and these."""
    tokenizer = Tokenizer.from_str(INFO.tokenizer_json)
    for texts, is_special in ((special, True), (plain, False)):
        tokenizer.add_tokens([AddedToken(t, special=is_special, normalized=False) for t in texts])
    return structs.replace(
        INFO,
        tokenizer_json=tokenizer.to_str(),
        chat_template=template,
        vocabulary_size=tokenizer.get_vocab_size(),
        supported=INFO.supported | {"grammar"},
    )


@cache
def tokenizer_of(kind: Spoken) -> PromptTokenizer:
    """The tokenizer of a model that reasons."""
    return PromptTokenizer(described(kind.template, kind.special, kind.plain))


@dataclass
class Answered:
    """What a generation came to."""

    pieces: list[TextPiece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        """The answer's reasoning."""
        return "".join(piece.reasoning for piece in self.pieces)

    @property
    def report(self) -> Any:
        """How it ended."""
        return self.pieces[-1].report


class ScriptedEngine:
    """Answers the first request with the first text, and so on.

    Args:
        kind: The model.
        answers: What the model says; a request for fewer tokens gets its beginning. One without
            the token that ends a turn says no more, and does not end.
        group: Tokens that one event has.

    Attributes:
        requests: The requests so far.
        cancelled: Ids of those that were cancelled before their end.
        pause: Every request but the first waits for it.
    """

    def __init__(self, kind: Spoken, *answers: str, group: int = 1, **limits: Any) -> None:
        self.info = described(kind.template, kind.special, kind.plain)
        self.tokenizer = tokenizer_of(kind)
        self.metrics = Metrics()
        self.queue = RequestQueue(EngineSettings(**limits), self.metrics, "scripted")
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.pause: asyncio.Event | None = None
        self.generator = TextGenerator(cast("EngineClient", self))
        self._answers = list(answers)
        self._group = group
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()

    def admit(self, caller: str = "", listener: Any = None) -> Place:
        """Take a place."""
        return self.queue.admit(self, caller, listener)

    def submit(self, request: GenerationRequest, place: Place) -> None:
        """A request is for the engine."""
        self.requests.append(request)
        answer = self._answers.pop(0)
        task = asyncio.create_task(self._answer(request, place, self.ids(answer)))
        self._tasks[request.id] = task

    def cancel(self, request_id: str) -> None:
        """A request is to be stopped."""
        # One that has delivered its last event may still be at its end.
        if self._tasks[request_id].cancel() and request_id not in self._ended:
            self.cancelled.append(request_id)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, in which special tokens are spelled."""
        ids: list[int] = self.tokenizer.decoder.encode(text, add_special_tokens=False).ids
        return ids

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.tokenizer.decoder.decode(list(ids), skip_special_tokens=False))

    async def _answer(self, request: GenerationRequest, place: Place, ids: list[int]) -> None:
        place.slot_taken()
        if self.pause is not None and len(self.requests) > 1:
            await self.pause.wait()
        given = ids[: request.max_tokens]
        reason: Any = None
        if len(given) == request.max_tokens:
            reason = "length"
        elif given[-1:] == self.ids(END):
            reason = "stop"
        for start in range(0, len(given), self._group):
            await asyncio.sleep(0)
            tokens = given[start : start + self._group]
            ends = reason if start + self._group >= len(given) else None
            if ends is not None:
                self._ended.add(request.id)
            logprobs = [-float(t) for t in tokens] if request.logprobs else []
            place.deliver(TokenEvent(request.id, tokens, logprobs, finish_reason=ends))
        if reason is None:
            await asyncio.Event().wait()

    async def ask(self, **options: Any) -> Answered:
        """Answer a chat of one message."""
        answered = Answered()
        values = options.pop("values", None)
        prompt = self.tokenizer.chat_prompt([{"role": "user", "content": "Q"}], (), values)
        async for piece in self.generator.stream(prompt, GenerationOptions(**options)):
            answered.pieces.append(piece)
        return answered

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 for a series that has no sample yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0
