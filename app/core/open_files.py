"""The limit of open files, which bounds the connections of a process."""

import resource

from app.core.logging import get_logger

log = get_logger()


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files where it is lower; returns how many it may open.

    Shells start programs with a limit of 1,024 for the sake of those that use ``select``, which
    this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("the process may open %d files: %d are wanted", allowed, wanted)
    return allowed
