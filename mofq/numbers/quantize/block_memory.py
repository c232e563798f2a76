"""Memory of blocks that come and go."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Of glibc's mallopt: memory is given back from this size on, and mapped by itself [bytes]; and
#: how many arenas there are. Those of threads are given back whenever they are empty.
_MALLOC_OPTIONS = {-1: 256_000_000, -3: 32_000_000, -8: 1}


def keep_freed_memory() -> None:
    """Have glibc keep the pages of blocks, all of a size, that are freed and asked for again.

    It would give each back to the system and have it cleared again: a third of the time of
    scoring, and half of the time of an export.
    """
    with suppress(OSError, AttributeError):  # another C library
        for option, size in _MALLOC_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, size)
