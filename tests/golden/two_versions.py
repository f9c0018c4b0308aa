"""Two versions with the same stores: the web process of one, training workers of both, twenty tiny jobs; then the other way
round. Not part of bin/test, since it needs two checkouts that are set up (bin/setup) or share one virtual environment:

    .venv/bin/python -m tests.golden.two_versions OLD NEW [--jobs 20]

OLD and NEW are the folders of the checkouts. The version of the web process creates the tables and also runs the inference
worker; the other version runs the checks worker; each runs a training worker. The worker of every third job is killed after
the job's first checkpoint, so that the other version may have to continue from it, and is then restarted. Prints which
version ran each attempt, and exits 0 only if all jobs succeeded, both versions ran some, and their models generate text.
Two times 20 jobs took 13 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests import hub_server
from tests.golden import scenario, trainer
from tests.golden.make_var import kill
from tests.golden.stack import Person, Stack, dynamodb_rows

KILL_EVERY = 3
SETTINGS = scenario.SETTINGS | {
    "max_steps": 600,
    "eval_every": 600,
    "sample_every": 600,
    "checkpoint_every_steps": 50,
}


class Round:
    """One direction: the web process of `web`, training workers of both."""

    def __init__(self, web: tuple[str, Path], other: tuple[str, Path], stack: Stack) -> None:
        self.web, self.other, self.stack = web, other, stack
        self.killed: dict[str, int] = {}  # pids of workers that were killed, by job

    def start(self) -> Person:
        stack, (name, checkout) = self.stack, self.web
        stack.start_stores(checkout)
        stack.start_web(checkout)
        stack.start_worker("checks", self.other[1])
        stack.start_worker("inference", checkout)
        for name, checkout in (self.web, self.other):
            stack.start_worker("training", checkout, f"training-{name}")
        ada = Person(stack.url, "ada@example.com").sign_up()
        ada.make_key()
        return ada

    def run(self, jobs: int) -> bool:
        ada = self.start()
        resources = scenario.Resources(files={"train": ada.upload("train.jsonl", trainer.rows())})
        for number in range(jobs):
            method = "lora" if number % 2 else "full"
            scenario.submit(ada, resources, f"job{number}", scenario.TINY, SETTINGS | {"method": method})
        to_kill = {id for number, id in enumerate(resources.jobs.values()) if number % KILL_EVERY == 0}
        while waiting := [
            id for id in resources.jobs.values() if self.status(ada, id) not in ("succeeded", "failed")
        ]:
            for id in to_kill & {*waiting} - {*self.killed}:
                self.kill_worker_of(ada, id)
            self.restart()
            time.sleep(1.5)  # twenty jobs at a time: the API takes 1,200 requests a minute
        return self.report(ada, resources)

    def status(self, ada: Person, id: str) -> str:
        return str(ada.job(id)["llmtuner"]["status"])

    def kill_worker_of(self, ada: Person, id: str) -> None:
        """Kills the worker of a job that has a checkpoint, from which the other version can continue."""
        if self.status(ada, id) == "running" and ada.checkpoints(id):
            number = int(self.worker_of(id).rpartition("/")[2])
            for process in self.stack.processes.values():
                if process.pid == number and process.poll() is None:
                    kill(number)
                    process.wait()
                    self.killed[id] = number

    def worker_of(self, id: str) -> str:
        """host/pid, as stored in the row."""
        return next(str(row["worker"]["S"]) for row in self.rows("Job") if row["job_id"]["S"] == id)

    def rows(self, table: str) -> list[dict[str, Any]]:
        return list(dynamodb_rows(self.stack.dynamodb_port)[f"llmtuner-{table}"]["rows"])

    def restart(self) -> None:
        for name, checkout in (self.web, self.other):
            process = self.stack.processes[f"training-{name}"]
            if process.poll() is not None:
                self.numbers()[process.pid] = name
                self.stack.start_worker("training", checkout, f"training-{name}")

    _numbers: dict[int, str] | None = None

    def numbers(self) -> dict[int, str]:
        """The version of each training worker so far, by pid."""
        if self._numbers is None:
            self._numbers = {}
        now = {self.stack.processes[f"training-{name}"].pid: name for name, _ in (self.web, self.other)}
        self._numbers |= now
        return self._numbers

    def report(self, ada: Person, resources: scenario.Resources) -> bool:
        numbers, ran = self.numbers(), Counter[str]()
        statuses = {name: self.status(ada, id) for name, id in resources.jobs.items()}
        passed_on = 0
        for name, id in resources.jobs.items():
            versions = [numbers.get(number, f"process {number}") for number in self.attempts(id)]
            ran.update(versions)
            passed_on += len({*versions}) > 1
            print(
                f"  {name:<6} {statuses[name]:<10} {' → '.join(versions)}{'  (worker killed)' * (id in self.killed)}"
            )
        models = [ada.job(id)["fine_tuned_model"] for id in list(resources.jobs.values())[:4]]
        wrote = [ada.call("POST", "completions", json={"model": model, "prompt": "the", "max_tokens": 2}) for model in models]  # fmt: skip
        print(f"  attempts: {dict(ran)}; {len(self.killed)} workers killed, {passed_on} jobs continued with the other version; {len(wrote)} models generated text")  # fmt: skip
        return {*statuses.values()} == {"succeeded"} and {*ran} == {self.web[0], self.other[0]}

    def attempts(self, id: str) -> list[int]:
        """The pids of the workers of each attempt, from the job's events."""
        chunks = sorted((row for row in self.rows("EventChunk") if row["job_id"]["S"] == id), key=lambda row: int(row["first_seq"]["N"]))  # fmt: skip
        events = [json.loads(line) for chunk in chunks for line in json.loads(chunk["lines"]["S"])]
        matches = [re.search(r"/(\d+)\.", event["message"]) for event in events if event["t"] == "attempt"]
        return [int(match[1]) for match in matches if match]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.two_versions", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--jobs", type=int, default=20)
    args = parser.parse_args()
    old, new = ("old", args.old.resolve()), ("new", args.new.resolve())
    worked = True
    for web, other in ((old, new), (new, old)):
        print(f"web {web[0]} ({web[1]}), workers of both", flush=True)
        with (
            tempfile.TemporaryDirectory() as name,
            hub_server.running(scenario.repositories(Path(name) / "hub")) as hub,
        ):
            stack = Stack(Path(name), HF_ENDPOINT=hub.url, JOBS_LEASE_S="5")
            try:
                worked &= Round(web, other, stack).run(args.jobs)
            finally:
                stack.stop()
    print("all succeeded" if worked else "FAILED")
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())
