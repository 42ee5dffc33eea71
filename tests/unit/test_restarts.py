"""When a dead engine process is started again, with a clock that the test sets."""

from app.llm.client.restarts import WINDOW_SECONDS, Restarts
from tests.support.queue import Clock


def test_the_delay_doubles_up_to_half_a_minute() -> None:
    """The first restart is immediate, since most deaths are single ones."""
    restarts = Restarts(100, Clock())
    delays = []
    for _ in range(9):
        assert restarts.died(was_ready=True) is None
        delays.append(restarts.delay)
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_old_deaths_do_not_count() -> None:
    """Deaths before the window change neither the delay nor the number of restarts allowed."""
    clock = Clock()
    restarts = Restarts(1, clock)
    for _ in range(10):
        assert restarts.died(was_ready=True) is None
        assert restarts.delay == 0
        clock.now += WINDOW_SECONDS + 1


def test_more_deaths_than_max_restarts_within_the_window_are_final() -> None:
    """Also if the engine was ready each time."""
    restarts = Restarts(2, Clock())
    assert [restarts.died(was_ready=True) for _ in range(2)] == [None, None]
    reason = restarts.died(was_ready=True)
    assert reason == "the engine process died 3 times within 10 minutes (engine.max_restarts is 2)"


def test_without_restarts_the_first_death_is_final() -> None:
    """This is what engine.max_restarts 0 means."""
    assert Restarts(0, Clock()).died(was_ready=True) is not None


def test_three_failed_starts_in_a_row_are_final() -> None:
    """However long each takes; a start that succeeds resets the count."""
    clock = Clock()
    restarts = Restarts(100, clock)
    for was_ready in (False, False, True, False, False):
        clock.now += 2 * WINDOW_SECONDS
        assert restarts.died(was_ready=was_ready) is None
    assert restarts.delay == 1
    assert restarts.died(was_ready=False) == "the engine process died 3 times while loading"
