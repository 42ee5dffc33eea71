"""The error of a grammar that cannot be enforced."""

from typing import Any


class GrammarError(ValueError):
    """A grammar cannot be compiled, or has a rule that would not be enforced.

    The message goes to callers: a clause about the grammar, which quotes a keyword at most.

    Attributes:
        part: The part of a schema that is at fault, if one is.
        where: The names that lead to it.
    """

    part: Any = None
    where: str = ""
