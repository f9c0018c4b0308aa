"""Memory that is prefaulted in the background."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from training.engine import memory

MB = 1 << 20


@pytest.fixture(autouse=True)
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "MIN_PREFAULT_BYTES", 1)
    yield
    memory.prefault(0)


def resident() -> int:
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[1]) * 4096


def test_prefaulted_memory_is_handed_out_zeroed():
    memory.prefault(5 * MB, pieces=2)
    before, pieces = resident(), [memory.zeroed(5 * MB) for _ in range(3)]
    assert [len(piece) for piece in pieces] == [5 * MB] * 3
    assert all(piece[at] == 0 for piece in pieces for at in (0, 5 * MB - 1))
    pieces[0][:1], pieces[1][:1], pieces[2][:1] = b"a", b"b", b"c"
    assert [bytes(piece[:2]) for piece in pieces] == [b"a\0", b"b\0", b"c\0"]
    assert resident() - before < 11 * MB  # the first two were there already


def test_prefaulted_memory_is_resident_before_use():
    before = resident()
    memory.prefault(64 * MB)
    memory.zeroed(1)  # waits for the threads
    assert resident() - before >= 64 * MB


def test_memory_for_another_size_is_released_and_does_not_count_as_peak():
    before = resident()
    memory.prefault(256 * MB)
    memory.prefault_heap(64 * MB)
    memory.zeroed(1)
    assert memory.peak_rss() - before >= 256 * MB
    memory.prefault(2 * MB)
    assert resident() - before < 32 * MB
    assert memory.peak_rss() - before < 32 * MB


def test_at_most_a_quarter_of_the_memory_is_prefaulted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_available", lambda: 15 * MB)
    before = resident()
    memory.prefault(4 * MB)
    memory.zeroed(1)
    assert resident() - before < 4 * MB


def test_a_memory_limit_does_not_fail_prefaulting(monkeypatch: pytest.MonkeyPatch):
    def refused(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.PrefaultedBuffer, "__init__", lambda self, size: refused(size))
    memory.prefault(64 * MB)
    assert len(memory.zeroed(2 * MB)) == 2 * MB
