"""The fuzz targets hold for random bytes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_any_bytes(target: Target) -> None:
    """A target holds for random inputs; ``make fuzz`` tries millions."""

    @settings(suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=200))
    def holds(data: bytes) -> None:
        target(data)

    holds()
