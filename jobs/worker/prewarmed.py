"""A prewarmed trainer: a process that has imported torch and waits for a run file, so that a job starts at once.

Only the main thread may start one, because a trainer dies with the thread that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings

from jobs.store import child_process
from jobs.store.child_process import Child, Limits
from training.plan.catalog import Machine, measure, this_machine

MAX_MEASUREMENTS = 5  # of the machine's rate
_child: Child | None = None
_base = ""  # folder of the base that was fully fine-tuned last: the next job often uses the same one, so its memory is reserved


def warm_up() -> None:
    """Starts a trainer unless one is running. Returns at once; the trainer needs some seconds to warm up."""
    global _child
    if _child is None or not _child.alive:
        assert threading.current_thread() is threading.main_thread()
        shut_down()
        _child = child_process.start("standby", *(["--base", _base] if _base else []), limits=limits())


def take(config: dict[str, Any]) -> Child:
    """Hands the prewarmed trainer (or one still warming up) to the caller for this run file."""
    global _child, _base
    warm_up()
    child, _child = _child, None
    _base = config["base"] if config["settings"].get("adapter") != "lora" else ""
    assert child
    return child


def shut_down() -> None:
    global _child
    if _child:
        _child.kill()
        _child = None


def limits() -> Limits:
    """A trainer's resource limits. Without a memory limit the kernel would choose which process to kill."""
    here = machine()
    memory = int(settings.JOBS["max_trainer_bytes"]) or (0 if here.device == "cuda" else here.memory)
    return Limits(memory_bytes=memory, cpu_s=int(settings.JOBS["max_runtime_s"] * here.cores))


_machine: Machine | None = None
_measurements = 0


def machine(idle: bool = False) -> Machine:
    """The machine that this worker's trainers run on. Its speed is measured when the worker starts and a few more times while
    it is idle, because during startup other processes keep the processors busy."""
    global _machine, _measurements
    if _machine is None or (idle and _measurements < MAX_MEASUREMENTS):
        _measurements += 1
        current = measure(this_machine())
        _machine = max(_machine or current, current, key=lambda machine: machine.rate)
    return _machine


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Locks the folder for the length of the block; yields whether that succeeded. The kernel releases the lock of a process
    that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
