"""Latency between a client and the engine: `bin/bench serving`.

GPT-2 124M with random weights, warm. Time to first token over HTTP (openai's client, web, Redis, inference worker,
server) compared with the engine alone in a process, in turns; and how soon a client that disconnects in the middle of a
response frees its slot and the engine.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, Contender, Scores

NAME = "bench/random-gpt2"  # like a model of the Hub that was downloaded before
REVISION = "0" * 40
ABOVE_MS, FREED_S = 150.0, 2.0  # the limits


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench serving")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--logs", action="store_true", help="print what the processes logged")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["JOBS_MAX_GENERATIONS_PER_OWNER"] = (
        "1"  # a second request starts only when the first has ended
    )
    from tests.faults import environment as env

    env.prepare_environment()
    folder = prepare_model()
    environment = env.start_environment()
    logging.disable(logging.WARNING)
    try:
        return measure(options, folder, environment)
    finally:
        if options.logs:
            for log in sorted(environment.folder.glob("*.log")):
                print(f"==== {log.name}", log.read_text(errors="replace")[-4000:], sep="\n")
        environment.stop()


def prepare_model() -> Path:
    """Puts the model into the cache of the Hub's client, with the prompt beside it."""
    from benchmarks.training import VOCABULARY, lay_out

    home = Path(os.environ["HF_HOME"]) / "hub" / ("models--" + NAME.replace("/", "--"))
    folder = home / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    lay_out(folder, {"n_layer": 12, "n_embd": 768, "n_head": 12}, examples=20)
    (folder / "prompt.txt").write_text(" ".join(str(i * 7919 % (VOCABULARY - 1)) for i in range(64)))
    return folder


def measure(options: argparse.Namespace, folder: Path, environment: Any) -> int:
    from tests.conftest import Studio

    scores = Scores()
    studio = Studio(os.environ["PUBLIC_URL"], environment.folder)
    key = make_key(folder)
    studio.start_web()
    environment.start_worker("inference", queue="inference")
    variables = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    argv = [sys.executable, str(ROOT / "benchmarks/contenders/ours.py"), "first-token", str(folder)]
    engine = Contender("engine alone", argv, variables)
    try:
        engine.wait_ready()
        person = Person(f"{studio.url}/v1", key, (folder / "prompt.txt").read_text())
        person.wait_warm()
        first_tokens(scores, person, engine, options.rounds)
        disconnects(scores, person, environment.workers["inference"].pid)
    finally:
        engine.process.kill()
        studio.stop()
    return scores.end()


def make_key(folder: Path) -> str:
    """An API key of a user who has added the model, as if it had been checked."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    from accounts import api_keys
    from jobs.store.tables import HubModel
    from tests.factories import make_user
    from training.plan import catalog

    user = make_user("bench")
    HubModel(
        user.owner_id, NAME, snapshot=catalog.describe(folder, id=NAME).as_dict() | {"revision": REVISION}
    ).save()
    return api_keys.create(user, "bench", ["inference"])[1]


class Person:
    """A user of openai's client."""

    def __init__(self, url: str, key: str, prompt: str) -> None:
        import openai

        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=0)
        self.prompt = prompt

    def begin(self, max_tokens: int) -> tuple[Any, float]:
        """Returns a stream whose first text has arrived, and the seconds until then."""
        started = time.perf_counter()
        stream = self.client.completions.create(
            model=NAME, prompt=self.prompt, max_tokens=max_tokens, temperature=0, stream=True
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                return stream, time.perf_counter() - started
        raise RuntimeError("the response ended without text")

    def wait_warm(self) -> None:
        import openai

        until = time.monotonic() + 180
        while True:
            try:
                self.first_token()
                return
            except openai.APIError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def first_token(self) -> float:
        """Seconds until the first token of a response, which is then read to its end."""
        stream, took = self.begin(4)
        list(stream)
        return took


def first_tokens(scores: Scores, person: Person, engine: Contender, rounds: int) -> None:
    theirs, ours = [], []
    engine.step()
    for _ in range(rounds):
        theirs.append(engine.step()["wall"] * 1000)
        ours.append(person.first_token() * 1000)
    for name, times in (("over HTTP", ours), ("engine alone", theirs)):
        scores.note(
            f"first token, {name}: median {statistics.median(times):.0f} ms, {min(times):.0f} to {max(times):.0f}"
        )
    allowed = statistics.median(theirs) + ABOVE_MS
    scores.add("first token (ms), engine + 150", statistics.median(ours), allowed, 1, less_is_better=True)
    worst = sorted(ours)[int(len(ours) * 0.95) - 1]
    scores.add("the same, 19 of 20", worst, allowed, 1, less_is_better=True)


def disconnects(scores: Scores, person: Person, worker: int, rounds: int = 5) -> None:
    slots, idle_times = [], []
    for _ in range(rounds):
        stream, _ = person.begin(900)
        stream.close()
        left = time.perf_counter()
        again, _ = person.begin(4)  # one request at a time per user: it waits for the first one's slot
        slots.append(time.perf_counter() - left)
        list(again)
        stream, _ = person.begin(900)
        stream.close()
        idle_times.append(seconds_until_idle(worker))
    scores.add("slot free after disconnect (s)", max(slots), FREED_S, 1, less_is_better=True)
    scores.add("engine idle after disconnect (s)", max(idle_times), FREED_S, 1, less_is_better=True)
    scores.note(f"{rounds} times each; the first includes the next response's first token")


def seconds_until_idle(worker: int) -> float:
    """Seconds until the worker's child processes stop using CPU time."""
    import psutil

    started, idle_checks = time.perf_counter(), 0
    server = psutil.Process(worker).children(recursive=True)

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in server)

    last = spent()
    while idle_checks < 4:
        time.sleep(0.05)
        now = spent()
        idle_checks = idle_checks + 1 if now - last < 0.01 else 0
        last = now
    return time.perf_counter() - started - idle_checks * 0.05


if __name__ == "__main__":
    sys.exit(main())
