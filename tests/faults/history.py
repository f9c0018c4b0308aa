"""The judge: what must be true of every job after any fault, read from the stores alone.

`Recorder` watches the rows while faults happen; `violations` looks at what is left. An empty list is innocence.
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

from tests.faults import house


@dataclass
class Recorder:
    """Looks at jobs many times a second: one holder an epoch, epochs and versions only rise, a cancel is never taken
    back, ends never change, and each checkpoint that is named lies there whole."""

    jobs: set[tuple[str, str]] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    _seen: dict[str, Any] = field(default_factory=dict)
    _holders: dict[tuple[str, int], str] = field(default_factory=dict)
    _pointers: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Recorder:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self) -> None:
        self._stop.set()

    def forget(self) -> None:
        for kept in (self.jobs, self.found, self._seen, self._holders):
            kept.clear()

    def _watch(self) -> None:
        from jobs.store import tables

        while not self._stop.wait(0.1):
            for owner, job_id in list(self.jobs):
                try:
                    job = tables.get(tables.Job, owner, job_id)
                except Exception:  # the store is away, as it should be in some tests
                    time.sleep(0.2)
                    continue
                if job is not None:
                    self.see(job)
                    self._look_at_bytes(job)

    def _look_at_bytes(self, job: Any) -> None:
        """Of each checkpoint when it is first named; past any proxy."""
        for entry in job.checkpoints or []:
            if entry["key"] in self._pointers:
                continue
            self._pointers.add(entry["key"])
            damaged = damage(entry)
            if damaged and entry["key"] in json.dumps(house.job_of(job.job_id, job.owner).checkpoints):
                self.found.append(f"{job.job_id} names {damaged}")

    def see(self, job: Any) -> None:
        before = self._seen.get(job.job_id)
        self._seen[job.job_id] = job
        if job.fencing_token and job.lease_owner:
            lease_owner = self._holders.setdefault((job.job_id, int(job.fencing_token)), job.lease_owner)
            if lease_owner != job.lease_owner:
                self.found.append(f"{job.job_id}: two holders of epoch {job.fencing_token}")
        if before is None:
            return
        if (
            job.version < before.version
            or job.fencing_token < before.fencing_token
            or job.last_seq < before.last_seq
        ):
            self.found.append(f"{job.job_id}: version, epoch or last_seq went back")
        if before.desired == "cancel" != job.desired:
            self.found.append(f"{job.job_id}: a cancel was taken back")
        if before.ended and (job.status, job.last_seq, job.fencing_token) != (
            before.status,
            before.last_seq,
            before.fencing_token,
        ):
            self.found.append(f"{job.job_id}: an end changed from {before.status} to {job.status}")


def damage(checkpoint: dict[str, Any]) -> str:
    """What is wrong with a stored checkpoint; "" when it is whole."""
    folder = house.objects() / str(checkpoint["key"])
    try:
        text = (folder / "manifest.json").read_bytes()
        wanted = {"manifest.json": checkpoint["sha256"]} | {
            f["name"]: f["sha256"] for f in json.loads(text)["files"]
        }
        for name, sha256 in wanted.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                return f"{folder.name}/{name}, which is another"
    except OSError as error:
        return f"{folder.name}, which isn't there: {error}"
    return ""


def curve(events: Iterable[Any]) -> dict[int, str]:
    """The loss of each step as hex; of a step that was run again, the last word."""
    return {e.data["step"]: e.data["loss_hex"] for e in events if e.data.get("t") == "metric"}


def digest(job: Any) -> list[tuple[str, str]]:
    """The weights that came of it."""
    return sorted((f["name"], f["sha256"]) for f in job.result["files"] if f["name"].endswith(".safetensors"))


def violations(job: Any, reference: Any | None = None, *, steps: int | None = None) -> list[str]:
    """Everything that is wrong with a job that should have ended. `reference`: the same job without faults."""
    from jobs.events import event_log

    found = _chunks(job)
    events = event_log.read(job.owner, job.job_id)
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        found.append("events are not numbered 1 … N")
    if not job.ended:
        found.append(f"it never ended: {job.status}")
    elif events[-1].data["t"] != "end" or len(events) != job.last_seq + 1:
        found.append("its feed doesn't end with its end")
    epochs = [e.data["message"] for e in events if e.data["t"] == "attempt"]
    if len(epochs) != len(set(epochs)):
        found.append("an attempt began twice")
    if job.status == "succeeded":
        found += _model(job)
        told = curve(events)
        if steps is not None and sorted(told) != list(range(1, steps + 1)):
            found.append(f"of {steps} steps {len(told)} are in the curve")
        found += _contradictions(events)
        if reference is not None:
            if digest(job) != digest(reference):
                found.append("the weights are not those of the run without faults")
            if told != curve(event_log.read(reference.owner, reference.job_id)):
                found.append("the losses are not those of the run without faults")
    return found


def _chunks(job: Any) -> list[str]:
    from jobs.store import tables

    found, expected, epoch = [], 1, 0
    holders: dict[int, str] = {}
    for chunk in tables.rows(tables.EventChunk, job.job_id):
        if chunk.first_seq > job.last_seq:
            continue  # sent, never confirmed, and so never read
        if chunk.first_seq != expected:
            found.append(f"chunk {chunk.first_seq} follows event {expected - 1}")
        if chunk.fencing_token < epoch:
            found.append(f"chunk {chunk.first_seq} is of an older epoch than the one before it")
        if holders.setdefault(chunk.fencing_token, chunk.lease_owner) != chunk.lease_owner:
            found.append(f"two holders wrote chunks of epoch {chunk.fencing_token}")
        expected, epoch = chunk.last_seq + 1, chunk.fencing_token
    if expected != job.last_seq + 1:
        found.append(f"chunks end at {expected - 1}, last_seq is {job.last_seq}")
    return found


def _contradictions(events: Iterable[Any]) -> list[str]:
    """Exact resume: whoever runs a step again must lose the same."""
    said: dict[int, str] = {}
    found = []
    for event in events:
        if event.data.get("t") == "metric":
            step, loss = event.data["step"], event.data["loss_hex"]
            if said.setdefault(step, loss) != loss:
                found.append(f"step {step} was run again with another loss")
    return found[:3]


def _model(job: Any) -> list[str]:
    from jobs.store import blobs, tables

    until = time.monotonic() + 30  # what follows from an end is made by whoever comes first
    model = None
    while model is None and time.monotonic() < until:
        model = tables.get(tables.TunedModel, job.owner, job.model_id)
        time.sleep(0.1)
    if model is None:
        return ["it succeeded without a model"]
    if json.loads(json.dumps(model.files)) != json.loads(json.dumps(job.result["files"])):
        return ["the model names other files than the end"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            blobs.fetch_folder(model.prefix, model.files, Path(folder))
    except blobs.StorageError as error:
        return [f"the model's bytes: {error}"]
    return []


def orphans(house_: house.House) -> list[int]:
    """Trainers of this house whose worker is gone."""
    mine = {pid for process in house_.workers.values() for pid in house.trainers_of(process.pid)}
    return [pid for pid in house.all_trainers() if pid not in mine]
