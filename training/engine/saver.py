"""Saves and resumes a run: when a checkpoint is due, what is in it, and how a run continues from one.

checkpoint.py knows the files, this module the run.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from training.engine import checkpoint, device
from training.engine.checkpoint import Restored, Snapshot
from training.engine.setup import Session
from training.plan import config
from training.plan.config import Settings
from training.plan.events import Failure
from training.plan.run_file import Run


@dataclass
class State:
    """What a step changes besides weights, optimizer and random generators. state.json of a checkpoint
    holds all of it."""

    step: int = 0
    cursor: int = 0  # examples seen so far, over all epochs
    tokens: int = 0
    loss: float | None = None  # of the last step
    seconds: float = 0.0  # spent training, over all attempts
    evaluated: int = -1  # step of the last evaluation
    base_losses: list[float] | None = None  # of each held-out example, before training
    best_losses: list[float] | None = None
    best_loss: float | None = None
    best_step: int = -1
    best_checkpoint: str = ""
    worse: int = 0  # evaluations since the best
    early: bool = False  # stopped early
    metrics: dict[str, Any] | None = None  # of the best evaluation

    def advance(self, cursor: int, tokens: int, loss: float, seconds: float) -> None:
        """Counts one optimizer step. `cursor` is the cursor after it."""
        self.step += 1
        self.cursor = cursor
        self.tokens += tokens
        self.loss = loss
        self.seconds += seconds


@dataclass(frozen=True)
class Resumable:
    """What a run can resume from: the requested checkpoint and older ones, the manifest of one and the settings
    they were made with, and the run with their date. On another day a chat template that writes the date
    makes other tokens."""

    folders: list[Path]
    manifest: dict[str, Any] | None
    settings: Settings | None
    run: Run


def find_resumable(run: Run) -> Resumable:
    """Removes incomplete checkpoints and looks for the one that `run.resume_from` names."""
    parent = _folder(run)
    parent.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(parent)
    folders = checkpoint.candidates(Path(run.resume_from), [parent]) if run.resume_from else []
    manifest = checkpoint.earlier_attempt(
        folders, run.job, config.settings_hash(run.settings, run.settings_schema)
    )
    if manifest is None:
        return Resumable(folders, None, None, replace(run, date=run.date or date.today().isoformat()))
    earlier = dict(manifest["settings"])
    smaller = run.settings.micro_batch_tokens
    # a smaller one was requested because memory ran out
    if smaller and smaller < earlier["micro_batch_tokens"]:
        earlier["micro_batch_tokens"] = smaller
    day = run.date or manifest.get("date") or date.today().isoformat()
    resolved = config.parse_stored(earlier)
    return Resumable(folders, manifest, resolved, replace(run, date=day))


def _folder(run: Run) -> Path:
    return Path(run.work_dir) / "checkpoints"


class Saver:
    """Writes the checkpoints of a run in the background, and restores one after a crash."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._writer = checkpoint.Writer(_folder(session.run), self._emit_checkpoint)
        self._saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def last_seconds(self) -> float:
        """Seconds that writing the last checkpoint took."""
        return self._writer.last_seconds

    def due_by_steps(self, step: int) -> bool:
        every = self.session.settings.checkpoint_every_steps
        return bool(every and step and step % every == 0)

    def due_by_time(self) -> bool:
        """Decided by the first process, and never while the previous checkpoint is still being written."""
        every = self.session.settings.checkpoint_every_s
        waited = time.monotonic() - self._saved_at
        return self.session.processes.is_main and 0 < every <= waited and not self._writer.busy

    def save(self, state: State, *, best: bool, final: bool) -> None:
        """Starts writing a checkpoint, at most once per step. Every process must call it: each has its own
        random state."""
        if self._saved_step == state.step:
            return
        session = self.session
        self._saved_step, self._saved_at = state.step, time.monotonic()
        if best:
            state.best_checkpoint = f"e{session.run.epoch}-s{state.step}"
        # A collective operation, so it comes before any process returns.
        generators = session.processes.gather(device.generator_state(session.device))
        # gathering the shards of a sharded model needs every process
        if not (session.processes.is_main or session.optimizer.sharded):
            return
        snapshot = self.snapshot(state, best, final)
        if session.processes.is_main:
            snapshot.random |= {f"process.{rank}": t.cpu() for rank, t in enumerate(generators) if rank}
            self._writer.submit(snapshot)

    def snapshot(self, state: State, best: bool = False, final: bool = False) -> Snapshot:
        """A copy of the whole state, so that training can continue while it is written."""
        session, optimizer = self.session, self.session.optimizer
        weights = {name: t.to("cpu", copy=True) for name, t in optimizer.weight_tensors().items()}
        moments = {name: t.to("cpu", copy=True) for name, t in optimizer.state_tensors().items()}
        randoms = device.random_state()
        return Snapshot(
            state.step,
            session.run.epoch,
            weights,
            moments,
            randoms,
            asdict(state),
            session.identity,
            session.environment,
            session.settings.stored(),
            str(session.data.base),
            session.implementation,
            best,
            final,
            session.run.date,
        )

    def wait(self) -> None:
        """Waits until the checkpoint being written is on disk. Raises the error if writing failed."""
        self._writer.wait()

    def _emit_checkpoint(
        self, snapshot: Snapshot, folder: Path, manifest: dict[str, Any], sha256: str
    ) -> None:
        size = (folder / "manifest.json").stat().st_size
        files = [*manifest["files"], {"name": "manifest.json", "bytes": size, "sha256": sha256}]
        self.session.emit(
            "checkpoint",
            step=snapshot.step,
            path=str(folder),
            bytes=sum(f["bytes"] for f in files),
            files=files,
            sha256=sha256,
            best=snapshot.best,
            final=snapshot.final,
        )

    # ---- resuming ------------------------------------------------------------------------------------------

    def restore(self, folders: list[Path]) -> State:
        """Restores weights, optimizer and random state from the first checkpoint that verifies. Returns its
        counters.

        Raises Failure("checkpoint_unreadable")."""
        session = self.session
        restored = self._first_readable(folders)
        session.optimizer.load(restored.weights, restored.optimizer)
        state = State(**restored.state)
        self._saved_step = restored.step
        device.restore_random_state(restored.random, session.device, session.processes.rank)
        self._writer.protected = {state.best_checkpoint} - {""}
        why = self._why_not_exact(restored)
        session.emit(
            "resumed",
            step=state.step,
            from_step=checkpoint.step_of(Path(str(session.run.resume_from))),
            exact=not why,
            why=why or "same machine, program and data",
        )
        return state

    def _first_readable(self, folders: list[Path]) -> Restored:
        shapes = self.session.optimizer.shapes()
        why = ""
        for folder in folders:
            try:
                return checkpoint.read(folder, self.session.identity, shapes)
            except checkpoint.Unreadable as error:
                why = why or str(error)
                self._warn(f"The checkpoint {folder.name} cannot be used: {error}.")
        raise Failure(
            "checkpoint_unreadable",
            f"None of the {len(folders)} checkpoints can be used. The requested one: {why}.",
        )

    def _why_not_exact(self, restored: Restored) -> str:
        """Why the resumed run may differ in its bits from an uninterrupted one; empty if it will not."""
        session = self.session
        environment = session.environment
        different = [name for name, value in environment.items() if restored.environment.get(name) != value]
        if restored.settings["micro_batch_tokens"] != session.settings.micro_batch_tokens:
            different.append("micro-batch")  # sums in another order
        if different:
            return f"the checkpoint was made with a different {', '.join(different)}"
        if session.device.on_gpu and not session.device.deterministic:
            return "a GPU sums in no fixed order unless deterministic is on"
        return ""

    def return_to_best(self, state: State) -> int:
        """Loads the weights of the best evaluation for the export, if the settings say to keep them. Returns
        the step of the weights that are kept."""
        session = self.session
        if not (session.processes.is_main or session.optimizer.sharded) or not session.settings.keep_best:
            return state.step
        if state.best_step in (-1, state.step):
            return state.step
        folder = _folder(session.run) / state.best_checkpoint
        try:
            restored = checkpoint.read(folder, session.identity, session.optimizer.shapes())
        except checkpoint.Unreadable as error:
            self._warn(
                f"The best checkpoint ({state.best_checkpoint}) cannot be used ({error}), so the final weights are kept."
            )
            return state.step
        session.optimizer.load_weights(restored.weights)
        message = f"The weights of step {state.best_step} have the lowest held-out loss and are kept."
        session.emit("log", level="info", message=message)
        return state.best_step

    def _warn(self, message: str) -> None:
        self.session.emit("log", level="warning", message=message)
