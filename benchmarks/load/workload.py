"""Prompts, lengths of answers and arrival times of a round, all from a seed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

# Common words: with a space before it, each is one token in most vocabularies, so that a prompt has
# about as many tokens as words. The report has the server's count.
_COMMON = (
    "the of and to in is that it was for on are with as his they be at one have this from or had "
    "by word but what some we can out other were all there when up use your how said an each she "
    "which do their time if will way about many then them write would like so these her long make "
    "thing see him two has look more day could go come did number sound no most people my over "
    "know water than call first who may down side been now find any new work part take get place "
    "made live where after back little only round man year came show every good me give our under"
)
WORDS = tuple(_COMMON.split())

# It comes last, so that no two prompts share a prefix. The task keeps answers long.
_TASK = "Write a long story with all of these words."
_TASK_WORDS = len(_TASK.split())
_MAX_DRAWS = 100

_LENGTHS = re.compile(r"(?P<low>\d+)-(?P<high>\d+)|(?P<list>\d+(,\d+)*)")


class WorkloadError(ValueError):
    """The workload cannot be planned; the message is one line with the reason."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A uniform distribution of lengths over a list of values or between two bounds.

    Attributes:
        values: A fixed length, a list to draw from, or two bounds.
        uniform: Whether ``values`` are the lower and the upper bound, both included.
    """

    values: tuple[int, ...]
    uniform: bool = False

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Read ``32`` (fixed), ``16-128`` (uniform) or ``16,64,256`` (a list).

        Raises:
            WorkloadError: The text is none of these, or a length is 0.
        """
        match = _LENGTHS.fullmatch(text)
        if match is None:
            raise WorkloadError(f"{text!r} is not a length: write 32, 16-128 or 16,64,256")
        if match["list"]:
            lengths = cls(tuple(int(value) for value in match["list"].split(",")))
        else:
            lengths = cls((int(match["low"]), int(match["high"])), uniform=True)
        if min(lengths.values) < 1 or (lengths.uniform and lengths.values[0] > lengths.values[1]):
            raise WorkloadError(f"{text!r} is not a length: the least is 1, and the lower is first")
        return lengths

    def draw(self, random: Random) -> int:
        """Draw a length."""
        # Repeatable on purpose; nothing here is secret.
        return random.randint(*self.values) if self.uniform else random.choice(self.values)  # nosec B311

    def __str__(self) -> str:
        return ("-" if self.uniform else ",").join(map(str, self.values))


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request of a round; ``at`` is its time of sending, in seconds after the round's start."""

    prompt: str
    max_tokens: int
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A description of the requests of a run, which the seed decides."""

    prompt_words: Lengths = Lengths((16,))
    output_tokens: Lengths = Lengths((32,))
    seed: int = 0

    def plan(
        self, count: int, *, round_name: str, rate: float | None = None
    ) -> list[PlannedRequest]:
        """The requests of a round; equal seeds, names and counts give equal requests.

        Args:
            count: Number of requests, whose prompts all differ.
            round_name: Rounds of different names share prompts only by chance.
            rate: Requests a second of a Poisson process; ``None``: all at time 0.

        Raises:
            WorkloadError: There are fewer different prompts of that length.
        """
        random = Random(f"{self.seed}/{round_name}")  # noqa: S311 - repeatable, not secret  # nosec B311
        prompts = _distinct_prompts(random, self.prompt_words)
        at = 0.0
        planned = []
        for _ in range(count):
            if rate is not None:
                at += random.expovariate(rate)
            planned.append(PlannedRequest(next(prompts), self.output_tokens.draw(random), at))
        return planned


def _distinct_prompts(random: Random, lengths: Lengths) -> Iterator[str]:
    """Prompts that all differ, because a server may answer an equal one from a cache."""
    seen: set[str] = set()
    while True:
        for _ in range(_MAX_DRAWS):
            prompt = _prompt(random, lengths.draw(random))
            if prompt not in seen:
                break
        else:
            raise WorkloadError(f"there are not enough different prompts of {lengths} words")
        seen.add(prompt)
        yield prompt


def _prompt(random: Random, words: int) -> str:
    chosen = " ".join(random.choices(WORDS, k=max(1, words - _TASK_WORDS)))  # nosec B311
    return f"{chosen}. {_TASK}" if words > _TASK_WORDS else " ".join(random.choices(WORDS, k=words))  # nosec B311
