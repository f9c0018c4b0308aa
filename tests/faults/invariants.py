"""Invariants of every job after any fault, checked on the stores alone.

`Recorder` watches the rows while faults are injected; `violations` checks the stores afterwards. An empty list means that
all invariants hold.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import environment as env


@dataclass
class Recorder:
    """Reads jobs many times a second: one lease owner per fencing token, tokens and versions only increase, a cancellation
    is never withdrawn, final states never change, and each checkpoint that a row names is complete."""

    jobs: set[tuple[str, str]] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    _seen: dict[str, Any] = field(default_factory=dict)
    _lease_owners: dict[tuple[str, int], str] = field(default_factory=dict)
    _pointers: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Recorder:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self) -> None:
        self._stop.set()

    def clear(self) -> None:
        for collection in (self.jobs, self.violations, self._seen, self._lease_owners):
            collection.clear()

    def _watch(self) -> None:
        from jobs.store import tables

        while not self._stop.wait(0.1):
            for owner, job_id in list(self.jobs):
                try:
                    job = tables.get(tables.Job, owner, job_id)
                except Exception:  # the store is down, as some tests intend
                    time.sleep(0.2)
                    continue
                if job is not None:
                    self.check(job)
                    self._check_bytes(job)

    def _check_bytes(self, job: Any) -> None:
        """Checks the files of each checkpoint when a row first names it, bypassing any proxy."""
        for entry in job.checkpoints or []:
            if entry["key"] in self._pointers:
                continue
            self._pointers.add(entry["key"])
            damaged = damage(entry)
            if damaged and entry["key"] in json.dumps(env.job_of(job.job_id, job.owner).checkpoints):
                self.violations.append(f"{job.job_id} names {damaged}")

    def check(self, job: Any) -> None:
        before = self._seen.get(job.job_id)
        self._seen[job.job_id] = job
        if job.fencing_token and job.lease_owner:
            lease_owner = self._lease_owners.setdefault((job.job_id, int(job.fencing_token)), job.lease_owner)
            if lease_owner != job.lease_owner:
                self.violations.append(
                    f"{job.job_id}: two lease owners with fencing token {job.fencing_token}"
                )
        if before is None:
            return
        if (
            job.version < before.version
            or job.fencing_token < before.fencing_token
            or job.last_seq < before.last_seq
        ):
            self.violations.append(f"{job.job_id}: version, fencing token or last_seq decreased")
        if before.desired == "cancel" != job.desired:
            self.violations.append(f"{job.job_id}: a cancellation was withdrawn")
        if before.ended and (job.status, job.last_seq, job.fencing_token) != (
            before.status,
            before.last_seq,
            before.fencing_token,
        ):
            self.violations.append(
                f"{job.job_id}: a final state changed from {before.status} to {job.status}"
            )


def damage(checkpoint: dict[str, Any]) -> str:
    """What is wrong with a stored checkpoint; "" if it is complete."""
    folder = env.objects() / str(checkpoint["key"])
    try:
        text = (folder / "manifest.json").read_bytes()
        expected = {"manifest.json": checkpoint["sha256"]} | {
            f["name"]: f["sha256"] for f in json.loads(text)["files"]
        }
        for name, sha256 in expected.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                return f"{folder.name}/{name}, which has another hash"
    except OSError as error:
        return f"{folder.name}, which cannot be read: {error}"
    return ""


def curve(events: Iterable[Any]) -> dict[int, str]:
    """The loss of each step as hex; for a step that ran again, the last one."""
    return {e.data["step"]: e.data["loss_hex"] for e in events if e.data.get("t") == "metric"}


def digest(job: Any) -> list[tuple[str, str]]:
    """The hashes of its final weights."""
    return sorted((f["name"], f["sha256"]) for f in job.result["files"] if f["name"].endswith(".safetensors"))


def violations(job: Any, reference: Any | None = None, *, steps: int | None = None) -> list[str]:
    """Everything that is wrong with a job that should have ended. `reference`: the same job without faults."""
    from jobs.events import event_log

    wrong = _chunks(job)
    events = event_log.read(job.owner, job.job_id)
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        wrong.append("events are not numbered 1 … N")
    if not job.ended:
        wrong.append(f"it never ended: {job.status}")
    elif events[-1].data["t"] != "end" or len(events) != job.last_seq + 1:
        wrong.append("its events do not end with its end event")
    attempts = [e.data["message"] for e in events if e.data["t"] == "attempt"]
    if len(attempts) != len(set(attempts)):
        wrong.append("an attempt began twice")
    if job.status == "succeeded":
        wrong += _model(job)
        losses = curve(events)
        if steps is not None and sorted(losses) != list(range(1, steps + 1)):
            wrong.append(f"{len(losses)} of {steps} steps are in the curve")
        wrong += _contradictions(events)
        if reference is not None:
            if digest(job) != digest(reference):
                wrong.append("the weights differ from those of the run without faults")
            if losses != curve(event_log.read(reference.owner, reference.job_id)):
                wrong.append("the losses differ from those of the run without faults")
    return wrong


def _chunks(job: Any) -> list[str]:
    from jobs.store import tables

    wrong, expected, fencing_token = [], 1, 0
    owners: dict[int, str] = {}
    for chunk in tables.rows(tables.EventChunk, job.job_id):
        if chunk.first_seq > job.last_seq:
            continue  # stored but never confirmed, so it is never read
        if chunk.first_seq != expected:
            wrong.append(f"chunk {chunk.first_seq} follows event {expected - 1}")
        if chunk.fencing_token < fencing_token:
            wrong.append(f"chunk {chunk.first_seq} has a lower fencing token than the one before it")
        if owners.setdefault(int(chunk.fencing_token), chunk.lease_owner) != chunk.lease_owner:
            wrong.append(f"two lease owners wrote chunks with fencing token {chunk.fencing_token}")
        expected, fencing_token = chunk.last_seq + 1, chunk.fencing_token
    if expected != job.last_seq + 1:
        wrong.append(f"chunks end at {expected - 1}, last_seq is {job.last_seq}")
    return wrong


def _contradictions(events: Iterable[Any]) -> list[str]:
    """Exact resume: a step that runs again must have the same loss."""
    losses: dict[int, str] = {}
    wrong = []
    for event in events:
        if event.data.get("t") == "metric":
            step, loss = event.data["step"], event.data["loss_hex"]
            if losses.setdefault(step, loss) != loss:
                wrong.append(f"step {step} ran again with another loss")
    return wrong[:3]


def _model(job: Any) -> list[str]:
    from jobs.store import blobs, tables

    until = time.monotonic() + 30  # the model is created after the job's end, by any process
    model = None
    while model is None and time.monotonic() < until:
        model = tables.get(tables.TunedModel, job.owner, job.model_id)
        time.sleep(0.1)
    if model is None:
        return ["it succeeded without a model"]
    if json.loads(json.dumps(model.files)) != json.loads(json.dumps(job.result["files"])):
        return ["the model lists other files than the result"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            blobs.fetch_folder(model.prefix, model.files, Path(folder))
    except blobs.StorageError as error:
        return [f"the files of the model: {error}"]
    return []


def orphans(environment: env.Environment) -> list[int]:
    """Trainers of this environment whose worker no longer runs."""
    mine = {pid for process in environment.workers.values() for pid in env.trainers_of(process.pid)}
    return [pid for pid in env.all_trainers() if pid not in mine]
