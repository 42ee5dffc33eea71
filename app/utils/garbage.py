"""The garbage collector, kept from looking through what never becomes garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def spare_what_stays() -> None:
    """Leave everything there is now out of later collections; called once a process is set up.

    The libraries of the service are 180,000 objects that live as long as it does. A collection of
    the oldest generation, which comes every thousand requests, looks at all of them: that stopped
    every stream for 160 to 250 ms on two busy cores, and was a tenth of what a request cost the
    API process.
    """
    gc.freeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Around imports, which make objects by the hundred thousand and next to no garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
