"""Random interleavings of the real lifecycle code over a real DynamoDB, with crashes, lost replies, late writes, zombies.

Each actor (a web request, a worker, a reconciler, a reader, a person) is a greenlet that stops before every call to the
store. A hub picks who goes on and what happens to the call: it is answered; it is applied but the reply gets lost; it is
in flight and applied some time later; or the actor dies there. After every applied write the invariants are checked
against a copy of the rows; at the end everything is let run fairly and must come to rest rightly.

A longer run, and all planted bugs: `bin/bench protocol`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
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
from jobs.store.tables import ENDED, Dataset, new_id
from jobs.worker.reconciler import Reconciler

STEPS = 2  # of the trainer that the workers play, unless the scenario has more
NUMBERS = {
    "lease_s": 10.0, "reconcile_s": 10.0, "watch_gap_s": 1e9, "void_after_s": 40.0, "backoff_first_s": 5.0,
    "janitor_s": 20.0, "audit_s": 60.0, "max_attempts": 10, "max_attempts_without_progress": 3, "max_platform_faults": 3,
    "max_jobs_per_owner": 5,
}  # fmt: skip
READS = {"GetItem", "BatchGetItem", "Query"}


class Violation(Exception):
    """A promise was broken."""


@dataclass
class Actor:
    name: str
    glet: greenlet
    pending: tuple[str, str, Callable[[], Any]] | None = None
    claim: transitions.Claim | None = None
    dead: bool = False


@dataclass
class Clock:
    """A reconciler's own; it goes on with its rounds, fast enough in unfair times to take live holders for dead."""

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
    bells: list[int] = field(default_factory=list)
    ends: list[tuple[str, str]] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)
    rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    winners: dict[tuple[str, int], str] = field(default_factory=dict)
    charged: dict[tuple[str, int], int] = field(default_factory=dict)
    seen: dict[tuple[str, int], str] = field(default_factory=dict)
    cursors: dict[tuple[str, str], int] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    by_key: dict[str, set[str]] = field(default_factory=dict)
    cancel_told: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    generation: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    fair: bool = False
    calls: int = 0

    # ---- the hub

    def add(self, name: str, act: Callable[[Actor], None]) -> None:
        actor = Actor(name, greenlet(lambda _: act(actor)))
        self.actors[name] = actor
        self._resume(actor, None)

    def _resume(self, actor: Actor, answer: Any) -> None:
        try:
            actor.pending = actor.glet.switch(answer)
        except Refused as refusal:
            self.log.append(f"{actor.name}: refused: {refusal}")
        if actor.glet.dead:
            self.actors.pop(actor.name, None)

    def gate(self, kind: str, label: str, perform: Callable[[], Any] = lambda: None) -> Any:
        """Called by an actor: stops until the hub says what happened. Sent again as long as the reply is lost."""
        actor = self.current()
        assert actor is not None
        while True:
            if actor.dead:
                raise GreenletExit
            told, value = HUB.switch((kind, label, perform))
            if told == "raise":
                raise value
            if told == "ok":
                return value
            if self.bug == "thawed" and "EventChunk" in label:
                raise ReadTimeoutError(endpoint_url="the store")

    def current(self) -> Actor | None:
        glet = getcurrent()
        return next((actor for actor in self.actors.values() if actor.glet is glet), None)

    def step(self, what: str, name: str) -> bool:
        """Lets something happen to an actor; False if it can't."""
        actor = self.actors.get(name)
        if actor is None or actor.pending is None:
            return False
        kind, label, perform = actor.pending
        if what in ("die", "term"):
            if kind != "trainer":
                return False
            self.log.append(f"{name}: trainer {what}")
            self._resume(actor, ("ok", what))
        elif what == "crash":
            self._crash(actor, label)
        elif what == "lost" and kind == "w":
            self.log.append(f"{name}: {label}  (applied, reply lost)")
            with suppress(Exception):
                perform()
            self._resume(actor, ("unknown", None))
        elif what == "late" and kind == "w":
            self.log.append(f"{name}: {label}  (in flight, no reply)")
            self.inflight.append((f"{name}: {label}", perform))
            self._resume(actor, ("unknown", None))
        elif what == "ok":
            self.log.append(f"{name}: {label}")
            try:
                answer = ("ok", perform())
            except Violation:
                raise
            except Exception as error:
                self.log[-1] += "  ✗"
                answer = ("raise", error)
            self._resume(actor, answer)
        else:
            return False
        return True

    def _crash(self, actor: Actor, label: str) -> None:
        if not actor.name.startswith(("worker", "reconciler", "web", "ends")):
            return
        self.log.append(f"{actor.name}: CRASH before {label}")
        actor.dead = True
        actor.glet.throw()
        self.actors.pop(actor.name, None)
        kind = actor.name.partition(".")[0]
        self.generation[kind] = self.generation.get(kind, 0) + 1
        if not kind.startswith("web") or (self.scenario.get("again", True) and self.generation[kind] < 3):
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
        """In place of PynamoDB's own way to the server."""
        self.calls += 1
        actor = self.current()
        if actor is None:
            return REAL_CALL(connection, operation, kwargs)
        table = kwargs.get("TableName", "").rpartition("-")[2]
        lease_owner = actor.claim.lease_owner if actor.claim else None

        def perform() -> Any:
            answer = REAL_CALL(connection, operation, kwargs)
            if operation not in READS:
                self.applied(operation, table, kwargs, answer, lease_owner)
            return answer

        return self.gate("r" if operation in READS else "w", f"{operation} {table}", perform)

    def applied(
        self, operation: str, table: str, kwargs: dict[str, Any], answer: Any, lease_owner: str | None
    ) -> None:
        rows = self.rows.setdefault(table, {})
        item = kwargs.get("Item") or answer.get("Attributes") or kwargs["Key"]
        values = {name: plain(value) for name, value in item.items()}
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
            self._job_moved(key[1], before, values, lease_owner)
        if table in ("Job", "JobIndex", "TunedModel"):
            self._check_references()

    def _job_moved(
        self, job_id: str, old: dict[str, Any], new: dict[str, Any], lease_owner: str | None
    ) -> None:
        if old["status"] in ENDED:
            for name in ("status", "result", "last_seq"):
                if old.get(name) != new.get(name):
                    raise Violation(f"I2 an end changed: {name} {old.get(name)} → {new.get(name)}")
        if lease_owner and self.holders.get(job_id) != lease_owner:
            raise Violation(
                f"I1 a write of one who isn't the holder was accepted ({old['status']} → {new['status']})"
            )
        if new["epoch"] != old["epoch"]:
            if (job_id, new["epoch"]) in self.winners or new["epoch"] != old["epoch"] + 1:
                raise Violation("I3 a fencing token was given twice, or left out")
            self.winners[job_id, new["epoch"]] = self.holders[job_id] = new["holder"]
        if new["status"] != "running":
            self.holders.pop(job_id, None)
        if any(new[name] > old[name] for name in ("attempts", "platform_faults")):
            count = self.charged[job_id, new["epoch"]] = self.charged.get((job_id, new["epoch"]), 0) + 1
            if count > 1:
                raise Violation("I8 one attempt was counted twice")
        if old["desired"] == "cancel" and new["desired"] != "cancel":
            raise Violation("I13 a cancel was taken back")

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {key[1]: row for key, row in self.rows.get("Job", {}).items()}

    def listed(self) -> set[str]:
        return {key[1] for key in self.rows.get("JobIndex", {}) if key[0] == f"sim#{self.owner}"}

    def has_bytes(self, folder: str) -> bool:
        return any(key.startswith(folder.rstrip("/") + "/") for key in self.objects)

    def _check_references(self) -> None:
        listed = self.listed()
        for job_id, job in self.jobs().items():
            if job["status"] in ENDED:
                continue
            if job_id not in listed:
                raise Violation("I9 a job that hasn't ended is missing from the list")
            folders = [c["key"] for c in json.loads(job.get("checkpoints") or "[]")]
            for folder in {*folders, job.get("checkpoint_key") or (folders or [""])[0]} - {""}:
                if not self.has_bytes(folder):
                    raise Violation(f"I10 {folder} is named by its job and deleted")
        for model in self.rows.get("TunedModel", {}).values():
            if not model.get("gone") and not self.has_bytes(str(model.get("prefix"))):
                raise Violation("I10 a model's bytes are deleted")

    # ---- what the actors do

    def start(self, kind: str) -> None:
        generation = self.generation.get(kind, 0)
        name = f"{kind}.{generation}" if generation else kind
        if kind.startswith("web"):
            key, suffix = self.scenario["submits"][int(kind[3:])]
            self.add(name, lambda actor: self.web(key, suffix))
        elif kind.startswith("worker"):
            self.add(name, self.worker)
        elif kind.startswith("reconciler"):
            self.add(name, self.reconcile)
        elif kind.startswith("ends"):
            self.add(name, self.end_things)

    def web(self, key: str, suffix: str) -> None:
        request = JobRequest(base="starter", dataset_id=self.scenario["dataset"], suffix=suffix)
        with suppress(OverQuota, LostRace):
            job = transitions.submit(self.owner, request, idempotency_key=key)
            if job.status != "void":
                self.accepted.add(job.job_id)

    def worker(self, actor: Actor) -> None:
        while True:
            self.gate("local", "listen for a bell")
            if self.bells:
                self.bells.pop(0)
                claim = transitions.claim_next(WorkerInfo(actor.name, f"{actor.name}/{self.owner}"))
                if claim:
                    actor.claim = claim
                    with suppress(LostRace):
                        self.attempt(claim)
                    actor.claim = None

    def attempt(self, claim: transitions.Claim) -> None:
        pointer = claim.job.checkpoint_key
        if pointer:
            there = self.gate("r", "read the checkpoint", lambda: self.has_bytes(str(pointer)))
            if not there and self.holders.get(claim.job_id) == claim.lease_owner:
                raise Violation("I10 the checkpoint to go on from is gone")
            if not there:
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
            told = self.gate("trainer", "a step")
            if told == "die":
                claim.trainer_died("killed")
                return
            if told == "term":
                claim.give_back()
                return
            folder = f"{claim.prefix}checkpoints/s{step}"
            self.gate("w", f"upload step {step}", lambda folder=folder: self.objects.add(folder + "/weights"))
            claim.move_pointer({"key": folder, "step": step, "epoch": claim.fencing_token})
            if steps > STEPS:  # fewer supersede nothing
                finalize.after_pointer(claim.job)
        if claim.desired == "cancel" or (claim.desired == "pause" and step < steps):
            claim.finish("cancelled" if claim.desired == "cancel" else "paused")
            return
        if step < steps:
            return
        final = f"{claim.prefix}final"
        self.gate("w", "upload the model", lambda: self.objects.add(final + "/weights"))
        result = {"prefix": final, "files": [{"name": "weights", "bytes": 1, "sha256": "0"}], "step": step}
        if self.bug == "model first":
            claim.job.result, claim.job.ended_at = {**result, "epoch": claim.fencing_token}, 1.0
            tuned_models.create_from(claim.job)
        claim.finish("succeeded", result=result)

    def flush(self, claim: transitions.Claim, lines: list[str]) -> None:
        first = int(claim.job.last_seq) + 1
        while True:
            batch = event_log.Batch(first, tuple(lines))
            try:
                event_log.append(claim, batch)
                break
            except PutError:
                lines = [*lines, '{"t":"more"}']  # only with the bug "thawed"
        claim.heartbeat({"step": 1}, None, batch.first_seq, batch.last_seq)

    def reconcile(self, actor: Actor) -> None:
        clock = Clock(self)
        reconciler = Reconciler(clock)
        while True:
            self.gate("local", "sleep")
            clock.advance()
            reconciler.tick()

    def end_things(self, actor: Actor) -> None:
        while True:
            self.gate("local", "wait for an end")
            if self.ends:
                finalize.after_end(*self.ends.pop(0))

    def reader(self, actor: Actor) -> None:
        while True:
            self.gate("local", "look for news")
            for job_id in sorted(self.jobs()):
                with suppress(access.NotFound):
                    self.take(
                        actor.name,
                        job_id,
                        event_log.read(self.owner, job_id, self.cursors.get((actor.name, job_id), 0)),
                    )

    def take(self, name: str, job_id: str, events: list[event_log.Event]) -> None:
        after = self.cursors.get((name, job_id), 0)
        stored = [event for event in events if event.data.get("t") != "end"]
        if [event.seq for event in stored] != list(range(after + 1, after + 1 + len(stored))):
            raise Violation(f"I4 a gap or a repetition after {after}: {[event.seq for event in stored]}")
        if len(stored) != len(events) and events[-1].seq != after + len(stored) + 1:
            raise Violation("I4 the end has another number than the one after the last event")
        for event in stored:
            text = json.dumps(event.data)
            if self.seen.setdefault((job_id, event.seq), text) != text:
                raise Violation(f"I4 two readers see different things at {event.seq}")
        self.cursors[name, job_id] = after + len(stored)

    def person(self, wishes: list[str]) -> None:
        for wish in wishes:
            for _ in range(self.rng.choice([0, 5, 15, 30])):
                self.gate("local", "think")
            while not (
                job_id := next((i for i, j in sorted(self.jobs().items()) if j["status"] != "void"), None)
            ):
                self.gate("local", "wait for a job")
            if wish == "delete":
                while self.jobs()[job_id]["status"] not in ENDED:
                    self.gate("local", "wait for the end")
                model_id = str(self.jobs()[job_id]["model_id"])
                transitions.delete(self.owner, job_id, with_model=True)
                self.deleted.add(job_id)
                for id in (job_id, model_id):
                    outbox.delete_bytes(self.owner, id)
                continue
            with suppress(Refused, access.NotFound):
                transitions.set_desired(self.owner, job_id, wish)  # type: ignore[arg-type]
                if wish == "cancel":
                    self.cancel_told.add(job_id)

    # ---- a run

    def run(self, steps: int) -> None:
        for n in range(len(self.scenario["submits"])):
            self.start(f"web{n}")
        for n in range(2):
            self.start(f"worker{n}")
            self.start(f"reconciler{n}")
            self.add(f"reader{n}", self.reader)
        self.start("ends0")
        for n, wishes in enumerate(self.scenario.get("people", [])):
            self.add(f"person{n}", lambda actor, wishes=wishes: self.person(wishes))
        frozen: dict[str, int] = {}
        for turn in range(steps):
            if self.rng.random() < 0.08:
                frozen[self.rng.choice(list(self.actors))] = turn + self.rng.choice([10, 40, 120])
            awake = [name for name in self.actors if frozen.get(name, 0) <= turn] or list(self.actors)
            fated = self._turn([name for name in awake for _ in range(self._weight(name))] or awake)
            if fated and self.rng.random() < 0.6:
                frozen[fated] = turn + self.rng.choice(
                    [20, 60, 150]
                )  # hears nothing for a while: a zombie to be
            if turn % 20 == 0 and self._rests() and not self.inflight:
                break
        self._come_to_rest()
        self._check_rest()

    def _turn(self, awake: list[str]) -> str:
        """Returns whose reply got lost, if one did."""
        chance, name = self.rng.random(), self.rng.choice(awake)
        if name.startswith("reader") and self.rng.random() < 0.7:
            name = self.rng.choice(awake)
        if self.faults > 0 and chance < 0.08:
            what = self.rng.choice(
                self.scenario.get("faults", ["late", "lost", "crash", "die", "term", "bell"])
            )
            if what == "bell":
                self.bells[:1] = []
            elif what in ("die", "term"):
                training = [n for n, a in self.actors.items() if a.pending and a.pending[0] == "trainer"]
                self.faults -= bool(training) and self.step(what, self.rng.choice(training))
            elif self.step(what, name):
                self.faults -= 1
                return name if what in ("late", "lost") else ""
        elif self.inflight and chance < 0.14:
            self.deliver(self.rng.randrange(len(self.inflight)))
        else:
            self.step("ok", name)
        return ""

    def _come_to_rest(self) -> None:
        self.fair = True
        while self.inflight:
            self.deliver(0)
        quiet = 0
        for _ in range(700):
            for name in list(self.actors):
                if not name.startswith("reader"):
                    self.step("ok", name)
            quiet = quiet + 1 if self._rests() else 0
            if quiet > 12:
                return

    def _rests(self) -> bool:
        """Nobody has anything left to do."""
        for name, actor in self.actors.items():
            label = actor.pending[1] if actor.pending else ""
            if name.startswith("web") or (name.startswith("person") and label != "wait for a job"):
                return False
        jobs = self.jobs()
        done = all(job["status"] in ENDED or self._is_parked(job) for job in jobs.values())
        return done and self.listed() <= {job_id for job_id, job in jobs.items() if self._is_parked(job)}

    def _weight(self, name: str) -> int:
        """Who is in the middle of something goes on more often than who looks whether there is anything."""
        actor = self.actors[name]
        busy = bool(actor.pending) and actor.pending[0] != "local"  # type: ignore[index]  # just asked
        return {"reconciler": 2, "reader": 1, "web": 4}.get(name.rstrip("0123456789."), 3) + 2 * busy

    def _is_parked(self, job: dict[str, Any]) -> bool:
        return job["status"] == job["desired"] + "d" == "paused"

    def _check_rest(self) -> None:
        jobs, models = self.jobs(), {key[1]: row for key, row in self.rows.get("TunedModel", {}).items()}
        for job_id in self.accepted:
            job = jobs.get(job_id)
            if job is None:
                raise Violation("I6 an accepted job vanished")
            if job["status"] == "void" or not (job["status"] in ENDED or self._is_parked(job)):
                raise Violation(f"I6 an accepted job never ends: {job['status']}, desired {job['desired']}")
        told = {row["job_id"] for row in self.rows.get("WebhookDelivery", {}).values()}
        for job_id, job in jobs.items():
            model = models.get(str(job.get("model_id")))
            alive = model is not None and not model.get("gone")
            if job["status"] == "succeeded" and job_id not in self.deleted and not alive:
                raise Violation("I5 succeeded without a model")
            if job["status"] in ("failed", "cancelled") and alive:
                raise Violation(f"I5 a job that {job['status']} has a model")
            if (
                model
                and alive
                and job["status"] == "succeeded"
                and model["prefix"] != json.loads(job["result"])["prefix"]
            ):
                raise Violation("I5 the model is of another attempt than the end")
            if job_id in self.deleted and alive:
                raise Violation("I10 the model of a deleted job is back")
            if job["status"] in ENDED - {"void"} and job_id not in told | self.deleted:
                raise Violation("I5 a job ended and nobody is told")
            if job_id in self.cancel_told and job["status"] != "cancelled":
                raise Violation(f"I11 a cancel that was acknowledged ended {job['status']}")
            by_key = self.by_key.setdefault(f"{job.get('suffix')}", set())
            if job["status"] != "void":
                by_key.add(job_id)
            tried_again = job["attempts"] or job["platform_faults"]
            if self.scenario.get("lossy") and (tried_again or job["status"] not in ("succeeded", "void")):
                raise Violation(
                    f"I14 a lost reply cost something: {job['status']}, tried again: {tried_again}"
                )
        if any(len(ids) > 1 for ids in self.by_key.values()):
            raise Violation("I12 two jobs for one key")
        self._check_quota(jobs)
        for job_id in jobs:
            with suppress(access.NotFound):
                self.take("late reader", job_id, event_log.read(self.owner, job_id, 0))
                if self.cursors["late reader", job_id] != jobs[job_id]["last_seq"]:
                    raise Violation("I4 the last events are missing")

    def _check_quota(self, jobs: dict[str, dict[str, Any]]) -> None:
        usage = tables.get(tables.Usage, self.owner, "jobs")
        # What the hourly audit would remove counts no more; a counter has nothing to audit by.
        held = {
            id
            for id in (usage.ids if usage else None) or ()
            if id not in jobs or jobs[id]["status"] not in ENDED
        }
        active = {id for id, job in jobs.items() if job["status"] not in ENDED}
        count = usage.version if usage and self.bug == "counter" else len(held)
        if count != len(active):
            raise Violation(f"I7 the quota says {count}, the truth is {len(active)}")


def plain(value: dict[str, Any]) -> Any:
    kind, content = next(iter(value.items()))
    if kind == "N":
        return float(content) if "." in content else int(content)
    return set(content) if kind == "SS" else content


HUB = getcurrent()
REAL_CALL = Connection._make_api_call

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"submits": [("k1", "b")]},
    "twin": {"submits": [("k1", "b"), ("k1", "b")]},
    "cancel": {"submits": [("k1", "b")], "people": [["cancel"]]},
    "pause": {"submits": [("k1", "b")], "people": [["pause", "run"]]},
    "mixed": {"submits": [("k1", "b")], "people": [["pause", "run"], ["cancel"]]},
    "delete": {"submits": [("k1", "b")], "people": [["delete"]]},
    "superseded": {"submits": [("k1", "b")], "steps": 5},
    "not sent again": {"submits": [("k1", "b")], "again": False},
    "lossy": {"submits": [("k1", "b")], "faults": ["late", "lost", "bell"], "lossy": True},
}


@contextmanager
def world(sim: Sim) -> Iterator[None]:
    """The product's own code, with the hub between it and its stores. Each run has a list of jobs of its own."""
    from django.conf import settings

    def delete_file(key: str) -> None:
        def perform() -> None:
            sim.objects.discard(key)
            sim._check_references()

        sim.gate("w", f"delete {key[-20:]}", perform)

    def delete_prefix(prefix: str) -> int:
        for key in [key for key in sorted(sim.objects) if key.startswith(prefix)]:
            delete_file(key)
        return 0

    def list_keys(prefix: str) -> list[str]:
        return sim.gate(
            "r", "list objects", lambda: sorted(key for key in sim.objects if key.startswith(prefix))
        )

    def enqueue(task: str, *args: str) -> None:
        if task == "after_end":
            sim.ends.append((args[0], args[1]))

    def enqueue_training(waiting: int) -> None:
        if len(sim.bells) < 3:
            sim.bells.append(waiting)

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
                settings.JOBS | NUMBERS | ({"lease_s": 1e9} if sim.scenario.get("lossy") else {}),
            ),
        ):
            stack.enter_context(patch.object(target, name, new))
        if "steps" not in sim.scenario:  # nothing is superseded; fewer calls, more rare orders
            stack.enter_context(patch.object(quotas, "record_checkpoint_bytes", lambda job: None))
            stack.enter_context(patch.object(quotas, "checkpoint_bytes", lambda owner: 0))
        if sim.bug:
            from tests.jobs.lifecycle.planted import PLANTED

            for target, name, new in PLANTED[sim.bug](sim):
                stack.enter_context(patch.object(target, name, new))
        yield


def explore(scenario: str, seed: int, bug: str = "", steps: int = 260) -> tuple[str, Sim]:
    """One run. Returns the violation in words ("" for none) and what happened."""
    dataset = Dataset(new_id("user"), new_id("file"), status="ready", key="x")
    sim = Sim(random.Random(f"{scenario}/{seed}"), dict(SCENARIOS[scenario], dataset=dataset.dataset_id), bug)
    dataset.owner = sim.owner
    tables.put_new(dataset)
    with world(sim):
        try:
            sim.run(steps)
        except Violation as violation:
            return str(violation), sim
        finally:
            for actor in list(sim.actors.values()):
                actor.dead = True
                actor.glet.throw()
    return "", sim
