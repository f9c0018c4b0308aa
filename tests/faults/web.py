"""The web process killed while it takes jobs and streams events."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from dataclasses import dataclass, field

from tests.faults import house as h
from tests.faults.stage import Measured, Stage


@dataclass
class Watcher:
    """Follows a job's stream as a browser does: comes back with the last number it has."""

    person: h.Person
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
        connection = http.client.HTTPConnection("127.0.0.1", h.web_port(), timeout=30)
        headers = {
            "Host": "localhost",
            "Cookie": f"session={self.person.session}",
            "Last-Event-ID": str(last),
        }
        connection.request("GET", f"/jobs/{self.job_id}/stream", headers=headers)
        answer = connection.getresponse()
        if answer.status != 200:
            self.ended = answer.status == 204
            time.sleep(0.2)
            return
        self.streams += 1
        number = 0
        while line := answer.readline():
            if not line.endswith(b"\n"):
                return  # cut off within a line
            self.text += line
            if told := re.match(rb"id: (\d+)", line):
                number = int(told[1])
            elif line.startswith(b"data: ") and number:
                self.ended = b'"t": "end"' in line
                self.seen.append(number)
                number = 0


def web_killed(stage: Stage, rounds: int = 1) -> Measured:
    """SIGKILL of the web process in the middle of a POST: sent again with the same key, it is one job. Whoever watches
    goes on by the last number; who trains feels nothing."""
    from jobs.lifecycle import transitions

    measured = Measured(rounds=rounds)
    stage.only(1)
    person = stage.house.person()
    stage.house.start_web()
    running = stage.submit(max_steps=100_000, checkpoint_every_steps=1000)
    h.wait_step(running, 5)
    watcher = Watcher(person, running).start()
    for number in range(rounds):
        key = f"round-{stage.some.random()}"
        answers: list[str] = []
        poster = threading.Thread(target=_post, args=(person, stage.dataset, key, answers))
        poster.start()
        time.sleep(stage.some.uniform(0, 0.5))
        stage.house.kill("web")
        poster.join()
        began = time.monotonic()
        stage.house.start_web()
        measured.worst("web back s", time.monotonic() - began)
        _post(person, stage.dataset, key, answers)
        made = [job.job_id for job in _jobs_of(h.OWNER) if (job.metadata or {}).get("key") == key]
        if len(made) != 1 or set(answers) != set(made):
            measured.wrong.append(f"number {number}: {len(made)} jobs, answers {answers}")
        measured.figures["answered first"] = measured.figures.get("answered first", 0.0) + (len(answers) == 2)
        for job_id in made:
            transitions.ask(h.OWNER, job_id, "cancel")
    transitions.ask(h.OWNER, running, "cancel")
    job = h.wait_ended(running, 60)
    until_told = time.monotonic() + 30
    while not watcher.ended and time.monotonic() < until_told:
        time.sleep(0.1)
    watcher.stop()
    if watcher.seen != list(range(1, int(job.last_seq) + 2)):
        measured.wrong.append(
            f"the watcher saw {len(watcher.seen)} events of {job.last_seq + 1}, or some twice"
        )
    if (job.fencing_token, job.attempts) != (1, 0):
        measured.wrong.append(f"training took {job.fencing_token} leases, {job.attempts} attempts")
    measured.figures["streams of the watcher"] = float(watcher.streams)
    stage.hear(measured)
    stage.house.kill("web")
    return measured


def strangers(stage: Stage, rounds: int = 1) -> Measured:
    """Two people watch their own jobs at the same time and ask for each other's: nobody hears or sees another's."""
    from jobs.events import event_log
    from jobs.lifecycle import transitions

    measured = Measured()
    stage.only(0)
    owners = [h.OWNER, h.OWNER + "-other"]
    people = [stage.house.person(owner) for owner in owners]
    stage.house.start_web()
    claims = []
    for owner in owners:
        job = h.job_of(h.submit(h.ready_dataset(owner), owner), owner)
        claims.append(transitions.claim(job, transitions.this_worker()))
    jobs = [claim.job_id for claim in claims if claim]
    watchers = [Watcher(person, job_id).start() for person, job_id in zip(people, jobs, strict=True)]
    for number in range(1, 11):
        for claim in claims:
            assert claim
            event = {"t": "log", "time": time.time(), "level": "info", "message": f"of {claim.job_id}"}
            event_log.append(claim, event_log.Batch(number, (json.dumps(event),)))
            claim.heartbeat({}, None, number, number)
            event_log.announce(claim.job_id, number)
        time.sleep(0.3)
    time.sleep(2)
    for who, watcher in enumerate(watchers):
        watcher.stop()
        if jobs[1 - who].encode() in watcher.text:
            measured.wrong.append("a stream carries another's events")
        if watcher.seen != list(range(1, 11)):
            measured.wrong.append(f"a watcher saw {watcher.seen}")
        for path in (
            "/jobs/{}/",
            "/jobs/{}/stream",
            "/v1/fine_tuning/jobs/{}",
            "/v1/fine_tuning/jobs/{}/events",
        ):
            status = _get(people[who], path.format(jobs[1 - who]))
            if status != 404:
                measured.wrong.append(f"{path} of another's job answers {status}")
    for claim in claims:
        assert claim
        claim.finish("failed")
    stage.house.kill("web")
    return measured


def _get(person: h.Person, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", h.web_port(), timeout=30)
    headers = {"Host": "localhost", "Cookie": f"session={person.session}"}
    if path.startswith("/v1/"):
        headers = {"Host": "localhost", "Authorization": f"Bearer {person.key}"}
    connection.request("GET", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def _post(person: h.Person, dataset: str, key: str, answers: list[str]) -> None:
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
    connection = http.client.HTTPConnection("127.0.0.1", h.web_port(), timeout=30)
    try:
        connection.request("POST", "/v1/fine_tuning/jobs", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException):
        return  # it died before it answered
    answers.append(json.loads(text)["id"] if answer.status == 200 else f"{answer.status} {text[:200]!r}")


def _jobs_of(owner: str) -> list[object]:
    from jobs.store.tables import Job, rows

    return list(rows(Job, owner))
