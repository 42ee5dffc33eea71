"""What is told of a download and of loading."""

import time

import pytest

from app.llm.client.stage import Stage
from app.llm.models.progress import Transfer, counted


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The only clock that the code reads."""
    return Clock(monkeypatch)


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int | None]] = []

    def __call__(self, message: str, percent: int | None = None, /) -> None:
        """Keep a line."""
        self.lines.append((message, percent))


def test_a_download_is_told_twice_a_second(clock: Clock) -> None:
    """With its share, size and, as soon as two reports make a speed, the speed and time left."""
    told = Told()
    transfer = Transfer("downloading m", told)
    for second in range(21):
        clock.now = 100 + second / 10
        transfer.came(second * 1e6, 40e6)
    assert told.lines == [
        ("downloading m: 12 % of 40 MB", 12),
        ("downloading m: 25 % of 40 MB, 10.0 MB/s, 3 s left", 25),
        ("downloading m: 37 % of 40 MB, 10.0 MB/s, 2 s left", 37),
        ("downloading m: 50 % of 40 MB, 10.0 MB/s, 2 s left", 50),
    ]


def test_small_files_are_not_told(clock: Clock) -> None:
    """Below a megabyte a download has no bar: its total grows with each of the small files."""
    told = Told()
    transfer = Transfer("downloading m", told)
    clock.now += 60
    transfer.came(1000, 2000)
    assert told.lines == []


def test_tensors_are_told_twice_a_second(clock: Clock) -> None:
    """All of them are given, in order, and a model that is read at once is not told of."""
    told, given = Told(), []
    for item in counted(range(1024), "loading m", told):
        given.append(item)
        clock.now += 1 / 1024
    assert given == [*range(1024)]
    assert told.lines == [
        ("loading m: 50 % of 1,024 tensors", 50),
        ("loading m: 100 % of 1,024 tensors", 100),
    ]
    at_once = Told()
    assert [*counted(range(9), "loading m", at_once)] == [*range(9)]
    assert at_once.lines == []


def test_a_stage_of_unknown_length_tells_its_seconds(clock: Clock) -> None:
    """Where a library tells nothing, the message shows that time passes; a per cent needs none."""
    stage = Stage()
    stage.reported("loading m with OpenVINO", None)
    assert stage.text == "loading m with OpenVINO"
    clock.now += 12.5
    assert stage.text == "loading m with OpenVINO (12 s)"
    stage.reported("loading m: 40 % of 272 tensors", 40)
    clock.now += 60
    assert stage.text == "loading m: 40 % of 272 tensors"
