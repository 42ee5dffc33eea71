"""Why a grammar cannot be honoured."""


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or that says more than would be honoured.

    The message goes to callers: a clause about the grammar, with at most a keyword of theirs.
    """
