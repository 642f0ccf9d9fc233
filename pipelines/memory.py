"""The driver keeps little of what it has freed: it lives as long as the list is, and its threads are many.

Nothing here changes what is computed. Measured in the driver (docs/log.md): the C library gives threads arenas of their own, and what Ray's
threads free lies scattered in all of them, 1.5 MiB more after each window of the list. With one arena for all it is 0.4 MiB.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

# Of malloc.h, the same on every glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE = 128 * 2**10
"""Bytes from which a piece is the system's own and goes back when it is freed: glibc's first value, which it otherwise raises to 32 MiB
once such pieces are freed."""


def hold_little() -> None:
    """Keep free memory together, where it can be used again or returned: one arena for all threads.

    To be called before the process has threads: an arena that is there stays. Does nothing where the C library is not glibc.
    """
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE)


def give_back() -> None:
    """Return free memory to the system. Does nothing where the C library is not glibc."""
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
