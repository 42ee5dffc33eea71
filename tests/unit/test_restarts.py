"""When a dead engine process is started again, by a clock that the test moves."""

from app.llm.engine.restarts import WINDOW_SECONDS, Restarts
from tests.support.queue import Clock


def test_the_delay_doubles_up_to_half_a_minute() -> None:
    """The first restart is immediate, since most deaths come alone."""
    restarts = Restarts(100, Clock())
    delays = []
    for _ in range(9):
        assert restarts.died(was_ready=True) is None
        delays.append(restarts.delay)
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_while_of_health_is_forgiving() -> None:
    """Deaths that lie longer back than the window count neither for the delay nor for the end."""
    clock = Clock()
    restarts = Restarts(1, clock)
    for _ in range(10):
        assert restarts.died(was_ready=True) is None
        assert restarts.delay == 0
        clock.now += WINDOW_SECONDS + 1


def test_too_many_deaths_in_a_while_are_the_end() -> None:
    """One more than engine.max_restarts, whether or not it served in between."""
    restarts = Restarts(2, Clock())
    assert [restarts.died(was_ready=True) for _ in range(2)] == [None, None]
    reason = restarts.died(was_ready=True)
    assert reason == "the engine process died 3 times within 10 minutes (engine.max_restarts is 2)"


def test_no_restart_at_all() -> None:
    """With engine.max_restarts 0 the first death is the end."""
    assert Restarts(0, Clock()).died(was_ready=True) is not None


def test_a_model_that_never_loads_is_the_end_however_long_it_takes() -> None:
    """Three failed starts in a row; one that succeeds begins the count anew."""
    clock = Clock()
    restarts = Restarts(100, clock)
    for was_ready in (False, False, True, False, False):
        clock.now += 2 * WINDOW_SECONDS
        assert restarts.died(was_ready=was_ready) is None
    assert restarts.delay == 1
    assert restarts.died(was_ready=False) == "the engine process died 3 times while loading"
