"""The memory of this process: how the allocator keeps it, prefaulting, and how much was used. Imports no
torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading

HUGE = 2 << 20  # bytes of a huge page
MADV_POPULATE_WRITE = 23  # not named by Python's mmap; since Linux 5.14
PREFAULT_CHUNK = 4 * HUGE  # bytes per call: any other mmap of the process waits that long
MIN_PREFAULT_BYTES = 256 << 20  # below this, page faults take too little time to matter
PREFAULT_THREADS = 2  # page faults mostly wait for the kernel, or for the host of a virtual machine


def limit_primitive_caches() -> None:
    """Limits the caches of compiled primitives in oneDNN and torch. Call it before importing torch.

    By default they keep 1024 shapes of 100 KB each. Rows differ in length at every step, so the caches would grow to
    a gigabyte within a thousand steps; for small models, a cache of that size is even a fifth slower than compiling
    again. A step uses fewer than 32 shapes."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def configure_allocator() -> None:
    """Makes the allocator keep freed memory, in huge pages: page faults for every activation cost a tenth of
    a step.

    Call it before importing torch. An optimization only: without glibc it does nothing."""
    limit_primitive_caches()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator on first use
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX = 0: large blocks come from the heap too
        libc.mallopt(-1, ctypes.c_int(-1).value)  # M_TRIM_THRESHOLD: never return memory to the system
    except (OSError, AttributeError):
        pass


class PrefaultedBuffer:
    """Memory whose pages are faulted in by background threads, during the import of torch or the wait for a
    job.

    Touching the two gigabytes of GPT-2's weights, gradients and moments takes 0.2 s, and four seconds on a
    virtual machine that gets each page from its host."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0
        self.piece = _mapped(self.size)
        self.stopped = False
        self.threads = [
            threading.Thread(target=self._touch, args=(i,), daemon=True) for i in range(PREFAULT_THREADS)
        ]
        for thread in self.threads:
            thread.start()

    def _touch(self, which: int) -> None:
        libc = ctypes.CDLL(None)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.piece))
        for at in range(which * PREFAULT_CHUNK, self.size, PREFAULT_THREADS * PREFAULT_CHUNK):
            piece = min(PREFAULT_CHUNK, self.size - at)
            if self.stopped:
                return
            if libc.madvise(ctypes.c_void_p(begin + at), ctypes.c_size_t(piece), MADV_POPULATE_WRITE):
                return  # older kernel: pages are faulted in when written to

    def take(self, size: int) -> memoryview | None:
        """The next `size` bytes, all zero. None if fewer are left."""
        begin, end = self.taken, self.taken + size
        if end > self.size:
            return None
        for thread in self.threads:
            thread.join()
        self.taken = -(-end // HUGE) * HUGE
        return memoryview(self.piece)[begin:end]

    def release(self) -> None:
        """Stops the threads; the memory is freed with the last reference to it."""
        self.stopped = True
        for thread in self.threads:
            thread.join()


_prefaulted: PrefaultedBuffer | None = None


def prefault(size: int, pieces: int = 1) -> bool:
    """Starts prefaulting memory for `zeroed`: `pieces` buffers of up to `size` bytes. Returns whether there
    is such memory.

    Does nothing if that is too little to matter, or more than a quarter of the available memory. Memory
    prefaulted for another size is released first."""
    global _prefaulted
    whole = pieces * -(-size // HUGE) * HUGE
    if _prefaulted and _prefaulted.size == whole:
        return True
    if _prefaulted:
        _prefaulted.release()
        _prefaulted = None
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))  # what `prefault_heap` left with the allocator
        reset_peak_rss()  # it was not used for training
    if MIN_PREFAULT_BYTES <= whole < _available() // 4:
        with contextlib.suppress(OSError):  # a memory limit: the allocation that really needs it will fail
            _prefaulted = PrefaultedBuffer(whole)
    return _prefaulted is not None


def prefault_heap(size: int) -> None:
    """Touches memory for activations and frees it to the allocator, which keeps it (see
    `configure_allocator`)."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    if block := libc.malloc(ctypes.c_size_t(size)):
        libc.memset(ctypes.c_void_p(block), 0, ctypes.c_size_t(size))
        libc.free(ctypes.c_void_p(block))


def _available() -> int:
    """Bytes available without swapping; 0 if unknown."""
    try:
        with open("/proc/meminfo") as known:
            return next(int(line.split()[1]) * 1024 for line in known if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def zeroed(size: int) -> mmap.mmap | memoryview:
    """`size` bytes, all zero: prefaulted memory if there is any, otherwise pages that cost nothing until
    written to.

    (torch.zeros would write them all, which delays the first step.)"""
    ready = _prefaulted.take(size) if _prefaulted else None
    return _mapped(size) if ready is None else ready


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Starts measuring the peak again (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
