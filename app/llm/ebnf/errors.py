"""The error of a grammar that cannot be enforced."""


class GrammarError(ValueError):
    """A grammar cannot be compiled, or has a rule that would not be enforced.

    The message goes to callers: a clause about the grammar, which quotes a keyword at most.
    """
