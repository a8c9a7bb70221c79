"""How the C library keeps memory that was freed: for the next message, not for the kernel.

By default glibc gives a freed megabyte back to the kernel, and faults it in anew, zeroed, a page at
a time, for the next message: that took more time than all copies of the bytes together. Whoever
sets glibc's own variables decides for themselves; another C library is left alone.
"""

from __future__ import annotations

import ctypes
import functools
import os

#: The most that glibc allows. What is larger, weights for instance, is mapped and given back.
MMAP_THRESHOLD_BYTES = 32 << 20
#: What a process may keep beyond what it uses: some copies each of a few large messages.
TRIM_THRESHOLD_BYTES = 128 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@functools.cache
def keep_freed_memory() -> bool:
    """Sets the thresholds of this process, once. Whether it did."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is None or any(name in os.environ for name in _VARIABLES):
        return False
    # Either alone would do harm: each also ends glibc's own raising of the other.
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )
