"""How long the way of one streamed chat is; the method is in tests/support/way.py."""

import pytest

from tests.support.way import Way, measure

MAX_CLASSES = 50
MAX_GENERATORS = 8


@pytest.fixture(scope="module")
def way() -> Way:
    """The way of one streamed chat, with an engine that takes a moment for each token."""
    return measure(engine={"echo_step_seconds": 0.005})


def test_a_streamed_chat_meets_few_classes(way: Way) -> None:
    """A reader who follows one streamed chat meets at most fifty classes of ours."""
    assert len(way.classes) <= MAX_CLASSES, sorted(way.classes)


def test_a_token_passes_few_generators(way: Way) -> None:
    """A token passes at most eight asynchronous generators from the engine to the socket."""
    assert {name.partition(":")[0].partition(".")[0] for name in way.generators} == {
        "app",
        "langchain_core",
    }
    assert len(way.generators) <= MAX_GENERATORS, sorted(way.generators)
