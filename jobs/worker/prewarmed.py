"""A trainer that is warm: it has imported torch and waits for a run file, so a job starts at once.

Only the main thread may start one: the trainer dies with the thread that started it.
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

LOOKS = 5  # at the machine's rate
_child: Child | None = None
_base = ""  # folder of what was fully fine-tuned last: the next job often takes the same, so its memory is held ready


def warm_up() -> None:
    """Starts one, unless one is there. Returns at once; it needs some seconds to be warm."""
    global _child
    if _child is None or not _child.alive:
        assert threading.current_thread() is threading.main_thread()
        let_go()
        _child = child_process.start("standby", *(["--base", _base] if _base else []), limits=limits())


def take(config: dict[str, Any]) -> Child:
    """The warm trainer (or one that still warms up): now the caller's, for this run file."""
    global _child, _base
    warm_up()
    child, _child = _child, None
    _base = config["base"] if config["settings"].get("adapter") != "lora" else ""
    assert child
    return child


def let_go() -> None:
    global _child
    if _child:
        _child.kill()
        _child = None


def limits() -> Limits:
    """A trainer's own limits. Memory beyond the machine's would end in the kernel's choice of a victim instead."""
    here = machine()
    memory = int(settings.JOBS["max_trainer_bytes"]) or (0 if here.device == "cuda" else here.memory)
    return Limits(memory_bytes=memory, cpu_s=int(settings.JOBS["max_runtime_s"] * here.cores))


_machine: Machine | None = None
_looks = 0


def machine(idle: bool = False) -> Machine:
    """What trainers of this worker compute on. Its rate is measured when the worker starts, and a few times more in idle
    moments: at a start everything starts, and the processors are busy with that."""
    global _machine, _looks
    if _machine is None or (idle and _looks < LOOKS):
        _looks += 1
        found = measure(this_machine())
        _machine = max(_machine or found, found, key=lambda machine: machine.rate)
    return _machine


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Whether the folder is ours for the length of the block. The kernel frees the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
