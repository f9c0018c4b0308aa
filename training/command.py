"""The commands `train` and `standby`. They read a run file, print events, and exit with one code for each
reason."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.engine import memory
from training.plan import catalog
from training.plan.config import ConfigError
from training.plan.events import EXIT, MAX_LINE_BYTES, REASONS, Failure, reason_of
from training.plan.run_file import Run

if TYPE_CHECKING:
    from training.engine.loop import Trained

LONGEST_TEXT = 4000  # characters of one text in an event


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if parser.prog.endswith(" train"):
        parser.add_argument("config", help="the run file (training/plan/run_file.py: Run)")
    else:
        parser.add_argument("--base", help="a folder: reserve the memory that fine-tuning this model takes")


def main(args: argparse.Namespace) -> int:
    path = _wait_for_run_file(args.base) if args.command == "standby" else args.config
    if path is None:
        return EXIT["stopped"]
    stop = threading.Event()
    # Until this handler is set, SIGTERM ends the process, which loses nothing.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    events = EventWriter()
    try:
        run = Run.load(path)
        if args.command == "standby" or run.job is not None:
            _die_with_parent()
        _prefault(run.base, run.settings.adapter)
        events.spool(Path(run.work_dir))
        train(run, events.emit, stop.is_set)
    except BaseException as error:
        return _fail(error, events)
    return EXIT["done"]


def train(run: Run, emit: Callable[..., None], stop: Callable[[], bool] = lambda: False) -> None:
    """All of `python -m training train`: trains, exports the model, and compares the export with it.

    Raises Failure with a reason from plan/events.py, or `loop.Stopped`."""
    from training.engine import loop
    from training.engine.device import out_of_memory

    try:
        trained = loop.train(run, emit, stop)
        if trained is not None:
            _export(trained, Path(run.work_dir) / "final", emit)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise Failure("out_of_memory", f"Out of memory: {str(error).splitlines()[0][:200]}") from error
        raise


def _export(trained: Trained, folder: Path, emit: Callable[..., None]) -> None:
    from training.engine.evaluate import verdict
    from training.export.folder import verify, write_folder

    files = write_folder(trained.model, folder, base=trained.base, details=trained.details)
    export_check = verify(trained.model, folder, base=trained.base)
    if trained.base_losses and trained.best_losses:
        emit("verdict", **verdict(trained.base_losses, trained.best_losses))
    emit(
        "done",
        step=trained.step,
        kept_step=trained.kept_step,
        early=trained.early,
        path=str(folder),
        files=files,
        metrics=trained.metrics,
        fidelity=export_check,
    )


def _fail(error: BaseException, events: EventWriter) -> int:
    """Turns an error into an event and an exit code. The only place that does."""
    if type(error).__name__ == "Stopped" or isinstance(error, KeyboardInterrupt):
        events.emit("log", level="info", message=REASONS["stopped"].sentence)
        return EXIT["stopped"]
    failure = as_failure(error)
    if failure.reason == "unexpected":
        traceback.print_exception(error)
        events.emit("log", level="error", message="".join(traceback.format_exception(error))[-LONGEST_TEXT:])
    events.emit("failed", reason=failure.reason, message=failure.message, advice=failure.advice)
    return EXIT[failure.reason]


def as_failure(error: BaseException) -> Failure:
    """Any error as a Failure with one of the known reasons."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, ConfigError):
        return Failure("bad_settings", str(error))
    reason = reason_of(error) if isinstance(error, OSError) else ""
    if isinstance(error, OSError) and reason == "disk_full":
        return Failure("disk_full", f"The disk is full: {error.filename or 'a file'} could not be written.")
    if isinstance(error, OSError) and reason == "not_writable":
        return Failure(
            "not_writable", f"{error.filename or 'The work folder'} cannot be written: {error.strerror}."
        )
    if isinstance(error, MemoryError):
        return Failure("out_of_memory")
    return Failure("unexpected", f"{type(error).__name__}: {error}"[:1000])


class EventWriter:
    """Writes each event as one line, to standard output and to the spool file in the work folder.

    From the spool, events can be recovered when the pipe was not read to its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the checkpoint thread emits events too
        self._out = sys.stdout.fileno()
        self._spool: int | None = None
        self._silent = os.environ.get("RANK", "0") != "0"  # with several processes, only the first emits

    def spool(self, work: Path) -> None:
        if not self._silent:
            work.mkdir(parents=True, exist_ok=True)
            self._spool = os.open(work / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def emit(self, t: str, **values: Any) -> None:
        if self._silent:
            return
        line = encode({"t": t, "time": time.time(), **values})
        with self._lock:
            if self._spool is not None:
                try:
                    os.write(self._spool, line)
                except OSError:
                    self._spool = None  # a full disk must not keep the last events from standard output
            view = memoryview(line)
            while view:
                view = view[os.write(self._out, view) :]


def encode(event: dict[str, Any]) -> bytes:
    """The event as one line of JSON with at most 16 KB. Numbers that are not finite are left out, and long texts are
    cut."""
    clean = _clean(event)
    line = json.dumps(clean, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    room = LONGEST_TEXT
    while len(line) > MAX_LINE_BYTES:
        room //= 2
        clean = {k: v[:room] + "…" if isinstance(v, str) and len(v) > room else v for k, v in clean.items()}
        clean = {k: v for k, v in clean.items() if room > 8 or isinstance(v, (str, int, float))}
        line = json.dumps(clean, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return line


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items() if not (isinstance(v, float) and not math.isfinite(v))}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value if not (isinstance(v, float) and not math.isfinite(v))]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate cannot be encoded
    return value


# ---- standby -----------------------------------------------------------------------------------------------


ROW = 512  # tokens for whose activations a standby process reserves memory


def _prefault(base: str, adapter: str) -> int:
    """Starts prefaulting memory for weights, gradients and both moments, if a single process fine-tunes a
    whole model on the CPU. This runs while torch is imported and data is read.

    Returns the bytes of a row's activations, or 0 in all other cases: adapters need little memory, a GPU
    has its own, and several processes may shard the model."""
    here = adapter == "none" and catalog.this_machine().device == "cpu" and "RANK" not in os.environ
    try:
        described = catalog.describe(base)
    except (OSError, ValueError):
        return 0  # reported when the model is loaded
    buffer = 4 * described.parameters + memory.HUGE  # plus alignment
    ready = memory.prefault(buffer if here else 0, pieces=4)
    return catalog.activation_memory(described, ROW) if ready else 0


def _wait_for_run_file(base: str | None) -> str | None:
    """Imports torch, runs a dummy step and waits for `{"config": path}`. None at the end of input: the
    process is not needed."""
    from training.engine.warm_up import warm_up

    warm_up()
    if base and (row := _prefault(base, "none")):
        memory.prefault_heap(row)
    os.write(sys.stdout.fileno(), encode({"t": "ready", "time": time.time()}))
    for line in iter(sys.stdin.buffer.readline, b""):
        try:
            order = json.loads(line)
        except ValueError:
            continue
        if isinstance(order, dict) and isinstance(order.get("config"), str):
            return str(order["config"])
    return None


def _die_with_parent() -> None:
    """Ends this process as soon as its parent has died, because then its events are lost and another worker will
    get the lease.

    The parent keeps our standard input open and writes a line at each heartbeat. When the pipe closes, the
    parent is dead."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode) and not stat.S_ISSOCK(os.fstat(0).st_mode):
        return  # started by hand

    def watch() -> None:
        while os.read(0, 1 << 16):
            pass
        os._exit(EXIT["stopped"])

    threading.Thread(target=watch, name="parent", daemon=True).start()
