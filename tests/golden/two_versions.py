"""Two versions of the studio over the same stores: web of one, training workers of both, twenty tiny jobs; then the other
way round. Not part of bin/test, since it needs two checkouts that are set up (bin/setup) or share one's environment:

    .venv/bin/python -m tests.golden.two_versions OLD NEW [--jobs 20]

OLD and NEW are folders of checkouts. The tables are made by the web's version; two training workers (one of each version),
an inference worker of the web's version and a checks worker of the other work. The worker of every third job is killed
once that job has a checkpoint, so that the other version may have to go on from it, and is then started again. Prints who
ran each attempt of each job, and exits 0 only if every job succeeded, both versions ran some, and their models write.
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
    """One direction: `web` serves, both run trainers."""

    def __init__(self, web: tuple[str, Path], other: tuple[str, Path], stack: Stack) -> None:
        self.web, self.other, self.stack = web, other, stack
        self.killed: dict[str, int] = {}  # process numbers of workers that were killed, by job

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
        things = scenario.Things(files={"train": ada.upload("train.jsonl", trainer.rows())})
        for number in range(jobs):
            method = "lora" if number % 2 else "full"
            scenario.submit(ada, things, f"job{number}", scenario.TINY, SETTINGS | {"method": method})
        to_kill = {id for number, id in enumerate(things.jobs.values()) if number % KILL_EVERY == 0}
        while waiting := [
            id for id in things.jobs.values() if self.status(ada, id) not in ("succeeded", "failed")
        ]:
            for id in to_kill & {*waiting} - {*self.killed}:
                self.kill_worker_of(ada, id)
            self.start_again()
            time.sleep(0.3)
        return self.tell(ada, things)

    def status(self, ada: Person, id: str) -> str:
        return str(ada.job(id)["llmtuner"]["status"])

    def kill_worker_of(self, ada: Person, id: str) -> None:
        """Once it has a checkpoint that the other version can go on from."""
        if self.status(ada, id) == "running" and ada.checkpoints(id):
            number = int(self.worker_of(id).rpartition("/")[2])
            for process in self.stack.processes.values():
                if process.pid == number and process.poll() is None:
                    kill(number)
                    process.wait()
                    self.killed[id] = number

    def worker_of(self, id: str) -> str:
        """host/process number, as the row has it."""
        return next(str(row["worker"]["S"]) for row in self.rows("Job") if row["job_id"]["S"] == id)

    def rows(self, table: str) -> list[dict[str, Any]]:
        return list(dynamodb_rows(self.stack.dynamodb_port)[f"llmtuner-{table}"]["rows"])

    def start_again(self) -> None:
        for name, checkout in (self.web, self.other):
            process = self.stack.processes[f"training-{name}"]
            if process.poll() is not None:
                self.numbers()[process.pid] = name
                self.stack.start_worker("training", checkout, f"training-{name}")

    _numbers: dict[int, str] | None = None

    def numbers(self) -> dict[int, str]:
        """The version of every training worker there was, by its process number."""
        if self._numbers is None:
            self._numbers = {}
        now = {self.stack.processes[f"training-{name}"].pid: name for name, _ in (self.web, self.other)}
        self._numbers |= now
        return self._numbers

    def tell(self, ada: Person, things: scenario.Things) -> bool:
        numbers, ran = self.numbers(), Counter[str]()
        statuses = {name: self.status(ada, id) for name, id in things.jobs.items()}
        passed_on = 0
        for name, id in things.jobs.items():
            who = [numbers.get(number, f"process {number}") for number in self.attempts(id)]
            ran.update(who)
            passed_on += len({*who}) > 1
            print(
                f"  {name:<6} {statuses[name]:<10} {' → '.join(who)}{'  (worker killed)' * (id in self.killed)}"
            )
        models = [ada.job(id)["fine_tuned_model"] for id in list(things.jobs.values())[:4]]
        wrote = [ada.call("POST", "completions", json={"model": model, "prompt": "the", "max_tokens": 2}) for model in models]  # fmt: skip
        print(f"  attempts: {dict(ran)}; {len(self.killed)} workers killed, {passed_on} jobs went over to the other version; {len(wrote)} models wrote")  # fmt: skip
        return {*statuses.values()} == {"succeeded"} and {*ran} == {self.web[0], self.other[0]}

    def attempts(self, id: str) -> list[int]:
        """Process numbers of the workers, an attempt each, from the job's own events."""
        chunks = sorted((row for row in self.rows("EventChunk") if row["job_id"]["S"] == id), key=lambda row: int(row["first_seq"]["N"]))  # fmt: skip
        events = [json.loads(line) for chunk in chunks for line in json.loads(chunk["lines"]["S"])]
        told = [re.search(r"/(\d+)\.", event["message"]) for event in events if event["t"] == "attempt"]
        return [int(match[1]) for match in told if match]


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
    print("all worked" if worked else "FAILED")
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())
