"""The process's own memory: how the allocator keeps it, how it is made ready, how much was used. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading

HUGE = 2 << 20  # bytes of a huge page
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python's mmap does not name
AT_ONCE = 4 * HUGE  # touched by one call; mapping anything else waits that long
WORTH_IT = 256 << 20  # bytes from which touching them is felt
TOUCHERS = 2  # threads: a page mostly waits for the kernel, or for the machine below it


def keep_few_primitives() -> None:
    """oneDNN, and torch above it, keep what they compiled for the last 1024 shapes, 100 KB each. Rows differ in length in
    every step: a gigabyte after a thousand steps, and a fifth slower for small models than to compile again. 32 are more than a
    step has. Call it before torch is imported."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def use_memory_well() -> None:
    """Keep freed memory, in huge pages: fresh pages for every activation cost a tenth of a step.

    Call it before torch is imported. A convenience: does nothing where there is no glibc."""
    keep_few_primitives()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's allocator reads it when it is first used
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too
        libc.mallopt(-1, ctypes.c_int(-1).value)  # M_TRIM_THRESHOLD: and never give it back
    except (OSError, AttributeError):
        pass


class Ready:
    """Memory whose pages are made while something else is done: importing torch, reading data, waiting for a job.

    The two gigabytes of GPT-2's weights, gradients and means cost 0.2 s to touch, and where a virtual machine has to ask
    its host for each page, four."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0
        self.piece = _mapped(self.size)
        self.stopped = False
        self.threads = [threading.Thread(target=self._touch, args=(i,), daemon=True) for i in range(TOUCHERS)]
        for thread in self.threads:
            thread.start()

    def _touch(self, which: int) -> None:
        libc = ctypes.CDLL(None)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.piece))
        for at in range(which * AT_ONCE, self.size, TOUCHERS * AT_ONCE):
            piece = min(AT_ONCE, self.size - at)
            if self.stopped:
                return
            if libc.madvise(ctypes.c_void_p(begin + at), ctypes.c_size_t(piece), POPULATE_WRITE):
                return  # an older kernel: the pages come when they are written to

    def take(self, size: int) -> memoryview | None:
        """The next `size` bytes, zeros; None when fewer are left."""
        begin, end = self.taken, self.taken + size
        if end > self.size:
            return None
        for thread in self.threads:
            thread.join()
        self.taken = -(-end // HUGE) * HUGE
        return memoryview(self.piece)[begin:end]

    def let_go(self) -> None:
        self.stopped = True
        for thread in self.threads:
            thread.join()


_ready: Ready | None = None


def make_ready(size: int, pieces: int = 1) -> bool:
    """Begins to touch what `fresh` will give out: `pieces` of up to `size` bytes, where that is worth it and no more than a
    quarter of what there is. Memory made ready for other sizes is let go."""
    global _ready
    whole = pieces * -(-size // HUGE) * HUGE
    if _ready and _ready.size == whole:
        return True
    if _ready:
        _ready.let_go()
        _ready = None
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))  # what `touch_heap` left with the allocator
        reset_peak_rss()  # it was never used
    if WORTH_IT <= whole < _available() // 4:
        with contextlib.suppress(OSError):  # a limit of the process: whoever needs the memory will tell
            _ready = Ready(whole)
    return _ready is not None


def touch_heap(size: int) -> None:
    """Memory for activations: touched, and left with the allocator, which keeps it (`use_memory_well`)."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    if block := libc.malloc(ctypes.c_size_t(size)):
        libc.memset(ctypes.c_void_p(block), 0, ctypes.c_size_t(size))
        libc.free(ctypes.c_void_p(block))


def _available() -> int:
    """Bytes that can be had without taking them from anybody."""
    try:
        with open("/proc/meminfo") as known:
            return next(int(line.split()[1]) * 1024 for line in known if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def fresh(size: int) -> mmap.mmap | memoryview:
    """`size` bytes of zeros: of what was made ready, else such as cost nothing until they are written to.

    (torch.zeros would write them all at once, while somebody waits for the first step.)"""
    ready = _ready.take(size) if _ready else None
    return _mapped(size) if ready is None else ready


def _mapped(size: int) -> mmap.mmap:
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
