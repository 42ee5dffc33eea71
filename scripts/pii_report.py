"""Recall and precision of the PII filter on the tests' corpora: `python -m scripts.pii_report`.

An entity counts as found only when its kind, beginning and end are right. ``--public`` takes the
corpus of public formats instead of the filter's own; ``--errors`` lists missed and wrong entities.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field

from app.core.pii.detectors import KINDS
from app.core.pii.scanner import PiiScanner
from tests.data import pii_corpus, pii_public
from tests.data.pii_corpus import Sample


@dataclass
class Score:
    """The filter's result on a corpus.

    Attributes:
        right: Number of entities found, by kind.
        missed: Kind, value and text of each entity that was not found.
        wrong: Kind, value and text of each match that is not exactly an entity.
    """

    right: Counter[str] = field(default_factory=Counter)
    missed: list[tuple[str, str, str]] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def recall(self, kind: str) -> float:
        """Share of the entities of a kind that were found."""
        missed = sum(1 for entry in self.missed if entry[0] == kind)
        return self.right[kind] / max(1, self.right[kind] + missed)

    def precision(self, kind: str) -> float:
        """Share of the matches of a kind that are entities."""
        wrong = sum(1 for entry in self.wrong if entry[0] == kind)
        return self.right[kind] / max(1, self.right[kind] + wrong)


def score(samples: list[Sample]) -> Score:
    """Run the filter with all kinds over a corpus."""
    scanner = PiiScanner()
    result = Score()
    for sample in samples:
        expected = Counter(sample.entities)
        found = Counter((e.kind, sample.text[e.start : e.end]) for e in scanner.find(sample.text))
        result.right.update(kind for kind, _ in (expected & found).elements())
        result.missed += [(*entry, sample.text) for entry in (expected - found).elements()]
        result.wrong += [(*entry, sample.text) for entry in (found - expected).elements()]
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true", help="list missed and wrong entities")
    parser.add_argument("--public", action="store_true", help="the corpus of public formats")
    arguments = parser.parse_args()
    corpus = pii_public if arguments.public else pii_corpus
    with_entities, without = corpus.positives(), corpus.negatives()
    result = score(with_entities + without)
    print(f"{len(with_entities)} texts with an entity, {len(without)} hard negatives\n")
    print(f"{'kind':<8}{'entities':>9}{'missed':>8}{'wrong':>7}{'recall':>9}{'precision':>11}")
    for kind in KINDS:
        missed = sum(1 for entry in result.missed if entry[0] == kind)
        wrong = sum(1 for entry in result.wrong if entry[0] == kind)
        print(
            f"{kind:<8}{result.right[kind] + missed:>9}{missed:>8}{wrong:>7}"
            f"{result.recall(kind):>9.3f}{result.precision(kind):>11.3f}"
        )
    if arguments.errors:
        for label, entries in (("missed", result.missed), ("wrong", result.wrong)):
            for found, value, text in entries:
                print(f"{label:<7} {found:<6} {value!r} in {text!r}")


if __name__ == "__main__":
    main()
