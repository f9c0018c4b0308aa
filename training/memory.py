"""The process's own memory: how the allocator keeps it, how much was used. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import sys


def use_memory_well() -> None:
    """Keep freed memory, in huge pages: fresh pages for every activation cost a tenth of a step.

    Call it before torch is imported. A convenience: does nothing where there is no glibc."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's allocator reads it when it is first used
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too
        libc.mallopt(-1, ctypes.c_int(-1).value)  # M_TRIM_THRESHOLD: and never give it back
    except (OSError, AttributeError):
        pass


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Begin measuring the peak anew (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
