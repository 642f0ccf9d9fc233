"""What a process has freed goes back to the system. For the driver, which lives as long as the list is.

Nothing here changes what is computed. Measured in the driver (docs/log.md): after a window of the list the C library holds 5 to 7 MiB
that nobody uses; Arrow's own pool keeps 20 MiB more of what index, ledger and report had in passing.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import pyarrow as pa


def use_system_pool() -> None:
    """Arrow takes its memory from the C library, which :func:`give_back` can ask to return it."""
    pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Return free memory to the system. Does nothing where the C library is not glibc."""
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
