"""The process's own memory: how the allocator keeps it, how much was used. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
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


def fresh(size: int) -> mmap.mmap:
    """`size` bytes of zeros that cost nothing until they are written to, then a huge page at a time.

    (torch.zeros would write them all at once, while somebody waits for the first step.)"""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


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
