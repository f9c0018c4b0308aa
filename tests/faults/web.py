"""The web process killed while it accepts jobs and streams events; and requests for another user's job."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults import environment as env
from tests.faults.scenario import Measured, Scenario

if TYPE_CHECKING:
    from jobs.store.states import JobStatus
    from jobs.store.tables import Job


@dataclass
class Watcher:
    """Follows a job's stream as a browser does: reconnects with the last event number it has."""

    person: env.Person
    job_id: str
    seen: list[int] = field(default_factory=list)
    text: bytes = b""
    streams: int = 0
    ended: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Watcher:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.is_set() and not self.ended:
            try:
                self._follow()
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)

    def _follow(self) -> None:
        last = self.seen[-1] if self.seen else 0
        connection = http.client.HTTPConnection("127.0.0.1", env.web_port(), timeout=30)
        headers = {
            "Host": "localhost",
            "Cookie": f"session={self.person.session}",
            "Last-Event-ID": str(last),
        }
        connection.request("GET", f"/jobs/{self.job_id}/stream", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            self.ended = response.status == 204
            time.sleep(0.2)
            return
        self.streams += 1
        number = 0
        while line := response.readline():
            if not line.endswith(b"\n"):
                return  # the connection was cut within a line
            self.text += line
            if match := re.match(rb"id: (\d+)", line):
                number = int(match[1])
            elif line.startswith(b"data: ") and number:
                self.ended = b'"t": "end"' in line
                self.seen.append(number)
                number = 0


def web_killed(scenario: Scenario, rounds: int = 1) -> Measured:
    """SIGKILL of the web process during a POST: when it is sent again with the same idempotency key, there is one job.
    Streams continue after the last event number, and training is not affected."""
    from jobs.lifecycle import transitions

    measured = Measured(rounds=rounds)
    scenario.run_workers(1)
    person = scenario.environment.person()
    scenario.environment.start_web()
    running = scenario.submit(max_steps=100_000, checkpoint_every_steps=1000)
    env.wait_step(running, 5)
    watcher = Watcher(person, running).start()
    for number in range(rounds):
        key = f"round-{scenario.rng.random()}"
        responses: list[str] = []
        poster = threading.Thread(target=_post, args=(person, scenario.dataset, key, responses))
        poster.start()
        time.sleep(scenario.rng.uniform(0, 0.5))
        scenario.environment.kill("web")
        poster.join()
        began = time.monotonic()
        scenario.environment.start_web()
        measured.record_max("web back s", time.monotonic() - began)
        _post(person, scenario.dataset, key, responses)
        made = [job.job_id for job in _jobs_of(env.OWNER) if (job.metadata or {}).get("key") == key]
        if len(made) != 1 or set(responses) != set(made):
            measured.violations.append(f"number {number}: {len(made)} jobs, responses {responses}")
        measured.figures["answered first"] = measured.figures.get("answered first", 0.0) + (
            len(responses) == 2
        )
        for job_id in made:
            transitions.set_desired(env.OWNER, job_id, "cancel")
    transitions.set_desired(env.OWNER, running, "cancel")
    job = env.wait_ended(running, 60)
    deadline = time.monotonic() + 30
    while not watcher.ended and time.monotonic() < deadline:
        time.sleep(0.1)
    watcher.stop()
    if watcher.seen != list(range(1, int(job.last_seq) + 2)):
        measured.violations.append(
            f"the watcher received {len(watcher.seen)} of {job.last_seq + 1} events, or some twice"
        )
    if (job.fencing_token, job.attempts) != (1, 0):
        measured.violations.append(f"training took {job.fencing_token} leases, {job.attempts} attempts")
    measured.figures["streams of the watcher"] = float(watcher.streams)
    scenario.collect(measured)
    scenario.environment.kill("web")
    return measured


def strangers(scenario: Scenario, rounds: int = 1) -> Measured:
    """Two users watch their own jobs at the same time and request each other's: neither can see anything of the other."""
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    measured = Measured()
    scenario.run_workers(0)
    owners = [env.OWNER, env.OWNER + "-other"]
    users = [scenario.environment.person(owner) for owner in owners]
    scenario.environment.start_web()
    claims = []
    for owner in owners:
        job = env.job_of(env.submit(env.ready_dataset(owner), owner), owner)
        claims.append(transitions.claim(job, transitions.this_worker()))
    jobs = [claim.job_id for claim in claims if claim]
    watchers = [Watcher(person, job_id).start() for person, job_id in zip(users, jobs, strict=True)]
    for number in range(1, 11):
        for claim in claims:
            assert claim
            event = {"t": "log", "time": time.time(), "level": "info", "message": f"of {claim.job_id}"}
            event_log.append(claim, event_log.Batch(number, (json.dumps(event),)))
            claim.heartbeat({}, None, number, number)
            event_log.announce(claim.job_id, number)
        time.sleep(0.3)
    time.sleep(2)
    for index, watcher in enumerate(watchers):
        watcher.stop()
        if jobs[1 - index].encode() in watcher.text:
            measured.violations.append("a stream carries events of another user")
        if watcher.seen != list(range(1, 11)):
            measured.violations.append(f"a watcher received {watcher.seen}")
        for path in (
            "/jobs/{}/",
            "/jobs/{}/stream",
            "/v1/fine_tuning/jobs/{}",
            "/v1/fine_tuning/jobs/{}/events",
        ):
            status = _get(users[index], path.format(jobs[1 - index]))
            if status != 404:
                measured.violations.append(f"{path} of another user's job returns {status}")
    for claim in claims:
        assert claim
        claim.finish(JobStatus.FAILED)
    scenario.environment.kill("web")
    return measured


def _get(person: env.Person, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", env.web_port(), timeout=30)
    headers = {"Host": "localhost", "Cookie": f"session={person.session}"}
    if path.startswith("/v1/"):
        headers = {"Host": "localhost", "Authorization": f"Bearer {person.key}"}
    connection.request("GET", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def _post(person: env.Person, dataset: str, key: str, responses: list[str]) -> None:
    body = {
        "model": "starter",
        "training_file": dataset,
        "metadata": {"key": key},
        "llmtuner": {"max_steps": 5},
    }
    headers = {
        "Host": "localhost", "Authorization": f"Bearer {person.key}", "Content-Type": "application/json",
        "Idempotency-Key": key,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", env.web_port(), timeout=30)
    try:
        connection.request("POST", "/v1/fine_tuning/jobs", json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException):
        return  # it was killed before it responded
    responses.append(
        json.loads(text)["id"] if response.status == 200 else f"{response.status} {text[:200]!r}"
    )


def _jobs_of(owner: str) -> list[Job]:
    from jobs.store import tables

    return list(tables.rows(tables.Job, owner))
