"""What is known of an answer beside its text."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability.

    Attributes:
        token: Its bytes; a character of the text may span several tokens.
        logprob: Natural logarithm of its probability, by the model alone.
        start: Where in the text it begins, in characters.
        top: The likeliest tokens of its place and their log-probabilities, likeliest first.
    """

    token: bytes
    logprob: float
    start: int
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """How a generation ended.

    Attributes:
        cached_tokens: Prompt tokens that were in the KV cache.
        completion_tokens: Tokens generated, the end-of-sequence token included.
        reasoning_tokens: Those of them that are reasoning.
        token_ids: The answer's tokens without the one that ended it; empty where they are not
            exactly the text, as after a stop string.
        broken_keywords: Keywords of the request's schema that the engine could not hold, and that
            the answer does not follow, as far as that was checked.
    """

    finish_reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    broken_keywords: tuple[str, ...] = ()
