"""Deterministic simulation of the job lifecycle: random interleavings of the real code over a real DynamoDB, with crashes,
lost replies, late writes and stale workers.

Each actor (a web request, a worker, a reconciler, a reader, a user) is a greenlet that yields to a scheduler before every
call to the store. The scheduler picks which actor runs next and what happens to its call: it is answered; it is applied,
but the reply is lost; it stays in flight and is applied later; or the actor crashes before it. The invariants (I1, I2, …)
are checked against a copy of the rows after every applied write. Finally every actor runs fairly and without faults until
nothing is left to do, and the final state is checked.

`bin/bench protocol` runs it for longer and with every planted bug.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

from botocore.exceptions import ReadTimeoutError
from greenlet import GreenletExit, getcurrent, greenlet
from pynamodb.connection.base import Connection
from pynamodb.exceptions import PutError

from jobs.events import event_log
from jobs.lifecycle import finalize, transitions
from jobs.lifecycle.transitions import JobRequest, LostRace, OverQuota, Refused
from jobs.registry import tuned_models
from jobs.store import access, blobs, outbox, queue, quotas, redis_client, tables
from jobs.store.queue import WorkerInfo
from jobs.store.states import JobStatus
from jobs.store.tables import ENDED, Dataset, new_id
from jobs.worker.reconciler import Reconciler

STEPS = 2  # of the trainer that the workers simulate, unless the scenario sets more
JOB_SETTINGS = {
    "lease_s": 10.0, "reconcile_s": 10.0, "watch_gap_s": 1e9, "void_after_s": 40.0, "backoff_first_s": 5.0,
    "janitor_s": 20.0, "audit_s": 60.0, "max_attempts": 10, "max_attempts_without_progress": 3, "max_platform_faults": 3,
    "max_jobs_per_owner": 5,
}  # fmt: skip
READ_OPERATIONS = {"GetItem", "BatchGetItem", "Query"}


UserAction = Literal["run", "pause", "cancel", "delete"]


class Violation(Exception):
    """An invariant was violated."""


@dataclass
class Actor:
    name: str
    glet: greenlet
    # The call it is waiting to make: kind ("r" read, "w" write, "trainer" or "local"), label, and what performs it.
    pending: tuple[str, str, Callable[[], Any]] | None = None
    claim: transitions.Claim | None = None
    dead: bool = False


@dataclass
class Clock:
    """A reconciler's own clock. It advances with each round, in the unfair phase so fast that live workers look dead."""

    sim: Sim
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += 1.0 if self.sim.fair else 11.0


@dataclass
class Sim:
    rng: random.Random
    scenario: dict[str, Any]
    bug: str = ""
    faults: int = 6
    owner: str = field(default_factory=lambda: new_id("user"))
    actors: dict[str, Actor] = field(default_factory=dict)
    inflight: list[tuple[str, Callable[[], Any]]] = field(default_factory=list)
    wakeups: list[int] = field(default_factory=list)  # messages in the training queue
    end_tasks: list[tuple[str, str]] = field(default_factory=list)  # "after_end" messages: owner and job
    objects: set[str] = field(default_factory=set)
    rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = field(default_factory=dict)
    lease_owners: dict[str, str] = field(default_factory=dict)  # of the running jobs
    claimed: dict[tuple[str, int], str] = field(default_factory=dict)  # (job, fencing token) -> lease owner
    charged: dict[tuple[str, int], int] = field(default_factory=dict)  # (job, fencing token) -> times counted
    seen: dict[tuple[str, int], str] = field(default_factory=dict)  # (job, event number) -> what readers got
    cursors: dict[tuple[str, str], int] = field(default_factory=dict)  # (reader, job) -> last event number
    accepted: set[str] = field(default_factory=set)
    by_key: dict[str, set[str]] = field(default_factory=dict)  # idempotency key -> its jobs
    acknowledged_cancels: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    generation: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    fair: bool = False
    calls: int = 0

    # ---- the scheduler

    def add(self, name: str, act: Callable[[Actor], None]) -> None:
        actor = Actor(name, greenlet(act))
        self.actors[name] = actor
        self._resume(actor, actor)  # the first switch passes the argument of `act`

    def _resume(self, actor: Actor, outcome: Any) -> None:
        try:
            actor.pending = actor.glet.switch(outcome)
        except Refused as refusal:
            self.log.append(f"{actor.name}: refused: {refusal}")
        if actor.glet.dead:
            self.actors.pop(actor.name, None)

    def yield_to_scheduler(self, kind: str, label: str, perform: Callable[[], Any] = lambda: None) -> Any:
        """Called by an actor: waits until the scheduler resumes it with the outcome. Repeats the call as long as its reply
        is lost."""
        actor = self.current()
        assert actor is not None
        while True:
            if actor.dead:
                raise GreenletExit
            outcome, value = SCHEDULER.switch((kind, label, perform))
            if outcome == "raise":
                raise value
            if outcome == "ok":
                return value
            if self.bug == "batch changes between sends" and "EventChunk" in label:
                raise ReadTimeoutError(endpoint_url="the store")

    def current(self) -> Actor | None:
        glet = getcurrent()
        return next((actor for actor in self.actors.values() if actor.glet is glet), None)

    def step(self, action: str, name: str) -> bool:
        """Resumes an actor with a fault or, for "ok", without one. False if that action does not apply to it."""
        actor = self.actors.get(name)
        if actor is None or actor.pending is None:
            return False
        kind, label, perform = actor.pending
        if action in ("die", "term"):
            if kind != "trainer":
                return False
            self.log.append(f"{name}: trainer {action}")
            self._resume(actor, ("ok", action))
        elif action == "crash":
            self._crash(actor, label)
        elif action == "lost" and kind == "w":
            self.log.append(f"{name}: {label}  (applied, reply lost)")
            with suppress(Exception):
                perform()
            self._resume(actor, ("unknown", None))
        elif action == "late" and kind == "w":
            self.log.append(f"{name}: {label}  (in flight, no reply)")
            self.inflight.append((f"{name}: {label}", perform))
            self._resume(actor, ("unknown", None))
        elif action == "ok":
            self.log.append(f"{name}: {label}")
            try:
                outcome = ("ok", perform())
            except Violation:
                raise
            except Exception as error:
                self.log[-1] += "  ✗"
                outcome = ("raise", error)
            self._resume(actor, outcome)
        else:
            return False
        return True

    def _crash(self, actor: Actor, label: str) -> None:
        if not actor.name.startswith(("worker", "reconciler", "web", "finalizer")):
            return
        self.log.append(f"{actor.name}: CRASH before {label}")
        actor.dead = True
        actor.glet.throw()
        self.actors.pop(actor.name, None)
        kind = actor.name.partition(".")[0]
        self.generation[kind] = self.generation.get(kind, 0) + 1
        if not kind.startswith("web") or (
            self.scenario.get("send_again", True) and self.generation[kind] < 3
        ):
            self.start(kind)

    def deliver(self, index: int) -> None:
        if index < len(self.inflight):
            label, perform = self.inflight.pop(index)
            self.log.append(f"   (late) {label}")
            try:
                perform()
            except Violation:
                raise
            except Exception:
                self.log[-1] += "  ✗"

    # ---- the calls

    def call(self, connection: Connection, operation: str, kwargs: dict[str, Any]) -> Any:
        """Replaces PynamoDB's own call to the server."""
        self.calls += 1
        actor = self.current()
        if actor is None:
            return REAL_CALL(connection, operation, kwargs)
        table = kwargs.get("TableName", "").rpartition("-")[2]
        lease_owner = actor.claim.lease_owner if actor.claim else None

        def perform() -> Any:
            response = REAL_CALL(connection, operation, kwargs)
            if operation not in READ_OPERATIONS:
                self.applied(operation, table, kwargs, response, lease_owner)
            return response

        return self.yield_to_scheduler(
            "r" if operation in READ_OPERATIONS else "w", f"{operation} {table}", perform
        )

    def applied(
        self, operation: str, table: str, kwargs: dict[str, Any], response: Any, lease_owner: str | None
    ) -> None:
        rows = self.rows.setdefault(table, {})
        item = kwargs.get("Item") or response.get("Attributes") or kwargs["Key"]
        values = {name: plain_value(value) for name, value in item.items()}
        keys = {
            "JobIndex": ("partition", "job_id"),
            "TunedModel": ("owner", "model_id"),
            "Job": ("owner", "job_id"),
        }
        first, second = keys.get(table, (next(iter(values)), ""))
        key = (str(values.get(first)), str(values.get(second)))
        before = rows.get(key)
        if operation == "DeleteItem":
            rows.pop(key, None)
            values = {}
        else:
            rows[key] = values
        if table == "Job" and before and values:
            self._check_job_change(key[1], before, values, lease_owner)
        if table in ("Job", "JobIndex", "TunedModel"):
            self._check_references()

    def _check_job_change(
        self, job_id: str, old: dict[str, Any], new: dict[str, Any], lease_owner: str | None
    ) -> None:
        if old["status"] in ENDED:
            for name in ("status", "result", "last_seq"):
                if old.get(name) != new.get(name):
                    raise Violation(
                        f"I2: the final state of a job changed: {name} {old.get(name)} → {new.get(name)}"
                    )
        if lease_owner and self.lease_owners.get(job_id) != lease_owner:
            raise Violation(f"I1: a write without the lease was accepted ({old['status']} → {new['status']})")
        if new["epoch"] != old["epoch"]:
            if (job_id, new["epoch"]) in self.claimed or new["epoch"] != old["epoch"] + 1:
                raise Violation("I3: a fencing token was issued twice or skipped")
            self.claimed[job_id, new["epoch"]] = self.lease_owners[job_id] = new["holder"]
        if new["status"] != "running":
            self.lease_owners.pop(job_id, None)
        if any(new[name] > old[name] for name in ("attempts", "platform_faults")):
            count = self.charged[job_id, new["epoch"]] = self.charged.get((job_id, new["epoch"]), 0) + 1
            if count > 1:
                raise Violation("I8: one attempt was counted twice")
        if old["desired"] == "cancel" and new["desired"] != "cancel":
            raise Violation("I13: a cancel was taken back")

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {key[1]: row for key, row in self.rows.get("Job", {}).items()}

    def listed(self) -> set[str]:
        return {key[1] for key in self.rows.get("JobIndex", {}) if key[0] == f"sim#{self.owner}"}

    def has_objects(self, folder: str) -> bool:
        return any(key.startswith(folder.rstrip("/") + "/") for key in self.objects)

    def _check_references(self) -> None:
        listed = self.listed()
        for job_id, job in self.jobs().items():
            if job["status"] in ENDED:
                continue
            if job_id not in listed:
                raise Violation("I9: a job that has not ended is missing from the list")
            folders = [c["key"] for c in json.loads(job.get("checkpoints") or "[]")]
            for folder in {*folders, job.get("checkpoint_key") or (folders or [""])[0]} - {""}:
                if not self.has_objects(folder):
                    raise Violation(f"I10: {folder} was deleted while its job still needs it")
        for model in self.rows.get("TunedModel", {}).values():
            if not model.get("gone") and not self.has_objects(str(model.get("prefix"))):
                raise Violation("I10: the files of a model were deleted")

    # ---- what the actors do

    def start(self, kind: str) -> None:
        generation = self.generation.get(kind, 0)
        name = f"{kind}.{generation}" if generation else kind
        if kind.startswith("web"):
            key, suffix = self.scenario["submits"][int(kind[3:])]
            self.add(name, partial(self.web, key, suffix))
        elif kind.startswith("worker"):
            self.add(name, self.worker)
        elif kind.startswith("reconciler"):
            self.add(name, self.reconcile)
        elif kind.startswith("finalizer"):
            self.add(name, self.run_end_tasks)

    def web(self, key: str, suffix: str, actor: Actor) -> None:
        request = JobRequest(base="starter", dataset_id=self.scenario["dataset"], suffix=suffix)
        with suppress(OverQuota, LostRace):
            job = transitions.submit(self.owner, request, idempotency_key=key)
            if job.status != "void":
                self.accepted.add(job.job_id)

    def worker(self, actor: Actor) -> None:
        while True:
            self.yield_to_scheduler("local", "wait for a wakeup")
            if self.wakeups:
                self.wakeups.pop(0)
                claim = transitions.claim_next(WorkerInfo(actor.name, f"{actor.name}/{self.owner}"))
                if claim:
                    actor.claim = claim
                    with suppress(LostRace):
                        self.attempt(claim)
                    actor.claim = None

    def attempt(self, claim: transitions.Claim) -> None:
        pointer = claim.job.checkpoint_key
        if pointer:
            exists = self.yield_to_scheduler(
                "r", "read the checkpoint", lambda: self.has_objects(str(pointer))
            )
            if not exists and self.lease_owners.get(claim.job_id) == claim.lease_owner:
                raise Violation("I10: the checkpoint to resume from was deleted")
            if not exists:
                return
        step = int(claim.job.checkpoint_step or 0)
        steps = self.scenario.get("steps", STEPS)
        while step < steps and claim.desired == "run":
            step += 1
            self.flush(
                claim,
                [
                    f'{{"t":"e{claim.fencing_token}.s{step}.{i}"}}'
                    for i in range(1 + (claim.fencing_token + step) % 3)
                ],
            )
            fate = self.yield_to_scheduler("trainer", "a step")
            if fate == "die":
                claim.trainer_died("killed")
                return
            if fate == "term":
                claim.give_back()
                return
            folder = f"{claim.prefix}checkpoints/s{step}"
            self.yield_to_scheduler(
                "w", f"upload step {step}", partial(self.objects.add, folder + "/weights")
            )
            claim.move_pointer({"key": folder, "step": step, "epoch": claim.fencing_token})
            if steps > STEPS:  # with fewer, no checkpoint is superseded
                finalize.after_pointer(claim.job)
        if claim.desired == "cancel" or (claim.desired == "pause" and step < steps):
            claim.finish(JobStatus.CANCELLED if claim.desired == "cancel" else JobStatus.PAUSED)
            return
        if step < steps:
            return
        final = f"{claim.prefix}final"
        self.yield_to_scheduler("w", "upload the model", partial(self.objects.add, final + "/weights"))
        result = {"prefix": final, "files": [{"name": "weights", "bytes": 1, "sha256": "0"}], "step": step}
        if self.bug == "model before the end":
            claim.job.result, claim.job.ended_at = {**result, "epoch": claim.fencing_token}, 1.0
            tuned_models.create_from(claim.job)
        claim.finish(JobStatus.SUCCEEDED, result=result)

    def flush(self, claim: transitions.Claim, lines: list[str]) -> None:
        first = int(claim.job.last_seq) + 1
        while True:
            batch = event_log.Batch(first, tuple(lines))
            try:
                event_log.append(claim, batch)
                break
            except PutError:
                lines = [*lines, '{"t":"more"}']  # only with the planted bug
        claim.heartbeat({"step": 1}, None, batch.first_seq, batch.last_seq)

    def reconcile(self, actor: Actor) -> None:
        clock = Clock(self)
        reconciler = Reconciler(clock)
        while True:
            self.yield_to_scheduler("local", "sleep")
            clock.advance()
            reconciler.tick()

    def run_end_tasks(self, actor: Actor) -> None:
        while True:
            self.yield_to_scheduler("local", "wait for an end task")
            if self.end_tasks:
                finalize.after_end(*self.end_tasks.pop(0))

    def reader(self, actor: Actor) -> None:
        while True:
            self.yield_to_scheduler("local", "poll for events")
            for job_id in sorted(self.jobs()):
                with suppress(access.NotFound):
                    self.check_events(
                        actor.name,
                        job_id,
                        event_log.read(self.owner, job_id, self.cursors.get((actor.name, job_id), 0)),
                    )

    def check_events(self, name: str, job_id: str, events: list[event_log.Event]) -> None:
        after = self.cursors.get((name, job_id), 0)
        stored = [event for event in events if event.data.get("t") != "end"]
        if [event.seq for event in stored] != list(range(after + 1, after + 1 + len(stored))):
            raise Violation(f"I4: a gap or a repetition after {after}: {[event.seq for event in stored]}")
        if len(stored) != len(events) and events[-1].seq != after + len(stored) + 1:
            raise Violation("I4: the end event does not have the number after the last event")
        for event in stored:
            text = json.dumps(event.data)
            if self.seen.setdefault((job_id, event.seq), text) != text:
                raise Violation(f"I4: two readers got different events with the number {event.seq}")
        self.cursors[name, job_id] = after + len(stored)

    def user(self, actions: list[UserAction], actor: Actor) -> None:
        for action in actions:
            for _ in range(self.rng.choice([0, 5, 15, 30])):
                self.yield_to_scheduler("local", "think")
            while not (
                job_id := next((i for i, j in sorted(self.jobs().items()) if j["status"] != "void"), None)
            ):
                self.yield_to_scheduler("local", "wait for a job")
            if action == "delete":
                while self.jobs()[job_id]["status"] not in ENDED:
                    self.yield_to_scheduler("local", "wait for the end")
                model_id = str(self.jobs()[job_id]["model_id"])
                transitions.delete(self.owner, job_id, with_model=True)
                self.deleted.add(job_id)
                for id in (job_id, model_id):
                    outbox.delete_bytes(self.owner, id)
                continue
            with suppress(Refused, access.NotFound):
                transitions.set_desired(self.owner, job_id, action)
                if action == "cancel":
                    self.acknowledged_cancels.add(job_id)

    # ---- a run

    def run(self, steps: int) -> None:
        for n in range(len(self.scenario["submits"])):
            self.start(f"web{n}")
        for n in range(2):
            self.start(f"worker{n}")
            self.start(f"reconciler{n}")
            self.add(f"reader{n}", self.reader)
        self.start("finalizer0")
        for n, actions in enumerate(self.scenario.get("users", [])):
            self.add(f"user{n}", partial(self.user, actions))
        frozen: dict[str, int] = {}
        for turn in range(steps):
            if self.rng.random() < 0.08:
                frozen[self.rng.choice(list(self.actors))] = turn + self.rng.choice([10, 40, 120])
            awake = [name for name in self.actors if frozen.get(name, 0) <= turn] or list(self.actors)
            unanswered = self._turn([name for name in awake for _ in range(self._weight(name))] or awake)
            if unanswered and self.rng.random() < 0.6:
                # It waits so long for the reply that it may have lost its lease by then.
                frozen[unanswered] = turn + self.rng.choice([20, 60, 150])
            if turn % 20 == 0 and self._is_idle() and not self.inflight:
                break
        self._run_fairly()
        self._check_final_state()

    def _turn(self, awake: list[str]) -> str:
        """One turn of one actor. Returns the actor whose reply was lost, or ""."""
        chance, name = self.rng.random(), self.rng.choice(awake)
        if name.startswith("reader") and self.rng.random() < 0.7:
            name = self.rng.choice(awake)
        if self.faults > 0 and chance < 0.08:
            fault = self.rng.choice(
                self.scenario.get("faults", ["late", "lost", "crash", "die", "term", "wakeup"])
            )
            if fault == "wakeup":  # its message is lost
                self.wakeups[:1] = []
            elif fault in ("die", "term"):
                training = [n for n, a in self.actors.items() if a.pending and a.pending[0] == "trainer"]
                self.faults -= bool(training) and self.step(fault, self.rng.choice(training))
            elif self.step(fault, name):
                self.faults -= 1
                return name if fault in ("late", "lost") else ""
        elif self.inflight and chance < 0.14:
            self.deliver(self.rng.randrange(len(self.inflight)))
        else:
            self.step("ok", name)
        return ""

    def _run_fairly(self) -> None:
        self.fair = True
        while self.inflight:
            self.deliver(0)
        idle = 0
        for _ in range(700):
            for name in list(self.actors):
                if not name.startswith("reader"):
                    self.step("ok", name)
            idle = idle + 1 if self._is_idle() else 0
            if idle > 12:
                return

    def _is_idle(self) -> bool:
        """Whether no actor has anything left to do."""
        for name, actor in self.actors.items():
            label = actor.pending[1] if actor.pending else ""
            if name.startswith("web") or (name.startswith("user") and label != "wait for a job"):
                return False
        jobs = self.jobs()
        done = all(job["status"] in ENDED or self._is_parked(job) for job in jobs.values())
        return done and self.listed() <= {job_id for job_id, job in jobs.items() if self._is_parked(job)}

    def _weight(self, name: str) -> int:
        """Actors in the middle of something run more often than those that poll for work."""
        pending = self.actors[name].pending
        busy = pending is not None and pending[0] != "local"
        return {"reconciler": 2, "reader": 1, "web": 4}.get(name.rstrip("0123456789."), 3) + 2 * busy

    def _is_parked(self, job: dict[str, Any]) -> bool:
        return job["status"] == job["desired"] + "d" == "paused"

    def _check_final_state(self) -> None:
        jobs, models = self.jobs(), {key[1]: row for key, row in self.rows.get("TunedModel", {}).items()}
        for job_id in self.accepted:
            job = jobs.get(job_id)
            if job is None:
                raise Violation("I6: an accepted job vanished")
            if job["status"] == "void" or not (job["status"] in ENDED or self._is_parked(job)):
                raise Violation(f"I6: an accepted job never ends: {job['status']}, desired {job['desired']}")
        notified = {row["job_id"] for row in self.rows.get("WebhookDelivery", {}).values()}
        for job_id, job in jobs.items():
            model = models.get(str(job.get("model_id")))
            alive = model is not None and not model.get("gone")
            if job["status"] == "succeeded" and job_id not in self.deleted and not alive:
                raise Violation("I5: a job succeeded without a model")
            if job["status"] in ("failed", "cancelled") and alive:
                raise Violation(f"I5: a job that ended {job['status']} has a model")
            if (
                model
                and alive
                and job["status"] == "succeeded"
                and model["prefix"] != json.loads(job["result"])["prefix"]
            ):
                raise Violation("I5: the model comes from another attempt than the result")
            if job_id in self.deleted and alive:
                raise Violation("I10: the model of a deleted job exists")
            if job["status"] in ENDED - {"void"} and job_id not in notified | self.deleted:
                raise Violation("I5: a job ended without a notification")
            if job_id in self.acknowledged_cancels and job["status"] != "cancelled":
                raise Violation(f"I11: a job whose cancel was acknowledged ended {job['status']}")
            by_key = self.by_key.setdefault(f"{job.get('suffix')}", set())
            if job["status"] != "void":
                by_key.add(job_id)
            retried = job["attempts"] or job["platform_faults"]
            if self.scenario.get("lossy") and (retried or job["status"] not in ("succeeded", "void")):
                raise Violation(
                    f"I14: a lost reply cost an attempt or the job: {job['status']}, retried: {retried}"
                )
        if any(len(ids) > 1 for ids in self.by_key.values()):
            raise Violation("I12: one idempotency key has two jobs")
        self._check_quota(jobs)
        for job_id in jobs:
            with suppress(access.NotFound):
                self.check_events("late reader", job_id, event_log.read(self.owner, job_id, 0))
                if self.cursors["late reader", job_id] != jobs[job_id]["last_seq"]:
                    raise Violation("I4: the last events are missing")

    def _check_quota(self, jobs: dict[str, dict[str, Any]]) -> None:
        usage = tables.get(tables.Usage, self.owner, "jobs")
        # What the hourly audit would remove is left out. A counter cannot be audited.
        held = {
            id
            for id in (usage.ids if usage else None) or ()
            if id not in jobs or jobs[id]["status"] not in ENDED
        }
        active = {id for id, job in jobs.items() if job["status"] not in ENDED}
        count = usage.version if usage and self.bug == "counter" else len(held)
        if count != len(active):
            raise Violation(f"I7: the quota counts {count} jobs, but {len(active)} are active")


def plain_value(value: dict[str, Any]) -> Any:
    kind, content = next(iter(value.items()))
    if kind == "N":
        return float(content) if "." in content else int(content)
    return set(content) if kind == "SS" else content


SCHEDULER = getcurrent()
REAL_CALL = Connection._make_api_call

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"submits": [("k1", "b")]},
    "twin": {"submits": [("k1", "b"), ("k1", "b")]},
    "cancel": {"submits": [("k1", "b")], "users": [["cancel"]]},
    "pause": {"submits": [("k1", "b")], "users": [["pause", "run"]]},
    "mixed": {"submits": [("k1", "b")], "users": [["pause", "run"], ["cancel"]]},
    "delete": {"submits": [("k1", "b")], "users": [["delete"]]},
    "superseded": {"submits": [("k1", "b")], "steps": 5},
    "not sent again": {"submits": [("k1", "b")], "send_again": False},
    "lossy": {"submits": [("k1", "b")], "faults": ["late", "lost", "wakeup"], "lossy": True},
}


@contextmanager
def simulated_stores(sim: Sim) -> Iterator[None]:
    """Puts the scheduler between the product's own code and its stores. Each run has its own list of jobs."""
    from django.conf import settings

    def delete_file(key: str) -> None:
        def perform() -> None:
            sim.objects.discard(key)
            sim._check_references()

        sim.yield_to_scheduler("w", f"delete {key[-20:]}", perform)

    def delete_prefix(prefix: str) -> int:
        for key in [key for key in sorted(sim.objects) if key.startswith(prefix)]:
            delete_file(key)
        return 0

    def list_keys(prefix: str) -> list[str]:
        return sim.yield_to_scheduler(
            "r", "list objects", lambda: sorted(key for key in sim.objects if key.startswith(prefix))
        )

    def enqueue(task: str, *args: str) -> None:
        if task == "after_end":
            sim.end_tasks.append((args[0], args[1]))

    def enqueue_training(waiting: int) -> None:
        if len(sim.wakeups) < 3:
            sim.wakeups.append(waiting)

    with ExitStack() as stack:
        for target, name, new in (
            (Connection, "_make_api_call", lambda connection, op, kwargs: sim.call(connection, op, kwargs)),
            (queue, "shard", lambda job_id: f"sim#{sim.owner}"),
            (queue, "index_rows", lambda: list(tables.rows(tables.JobIndex, f"sim#{sim.owner}"))),
            (outbox, "PARTITION", f"errands#{sim.owner}"),
            (blobs, "delete_file", delete_file),
            (blobs, "delete_prefix", delete_prefix),
            (blobs, "list_keys", list_keys),
            (redis_client, "enqueue", enqueue),
            (redis_client, "enqueue_training", enqueue_training),
            (event_log, "announce", lambda *args: None),
            (
                settings,
                "JOBS",
                settings.JOBS | JOB_SETTINGS | ({"lease_s": 1e9} if sim.scenario.get("lossy") else {}),
            ),
        ):
            stack.enter_context(patch.object(target, name, new))
        if "steps" not in sim.scenario:  # no checkpoint is superseded, and fewer calls allow more orders
            stack.enter_context(patch.object(quotas, "record_checkpoint_bytes", lambda job: None))
            stack.enter_context(patch.object(quotas, "checkpoint_bytes", lambda owner: 0))
        if sim.bug:
            from tests.jobs.lifecycle.planted import PLANTED

            for target, name, new in PLANTED[sim.bug](sim):
                stack.enter_context(patch.object(target, name, new))
        yield


def explore(scenario: str, seed: int, bug: str = "", steps: int = 260) -> tuple[str, Sim]:
    """One run. Returns the violation ("" for none) and the simulation with its log."""
    dataset = Dataset(new_id("user"), new_id("file"), status="ready", key="x")
    sim = Sim(random.Random(f"{scenario}/{seed}"), dict(SCENARIOS[scenario], dataset=dataset.dataset_id), bug)
    dataset.owner = sim.owner
    tables.put_new(dataset)
    with simulated_stores(sim):
        try:
            sim.run(steps)
        except Violation as violation:
            return str(violation), sim
        finally:
            for actor in list(sim.actors.values()):
                actor.dead = True
                actor.glet.throw()
    return "", sim
