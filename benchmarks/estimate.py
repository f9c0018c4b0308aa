"""`bin/bench estimate`: what the form says before a job starts, against what the job then takes.

    bin/bench estimate [--teach 12] [--jobs 20] [--seed 1] [--history FILE --minutes 7]

Jobs of varied size (base, rows, length, epochs, batch, method) go through a real worker: submitted, claimed, data
fetched, trained, checkpoints and model stored. The first ones only teach; before each of the others the estimate is
taken as the form takes it, and afterwards compared with the time from claim to end and with the trainer's peak memory.
The second base has the shape of DistilGPT-2 with weights drawn at random, since time does not depend on their values.
`--history` keeps all in a file, so that a campaign may be run in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OWNER = "user-estimates"
LARGE = "distilgpt2"
SECONDS = (10.0, 16.0)  # what a job is made to take, as far as is known before


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench estimate")
    parser.add_argument("--teach", type=int, default=12, help="jobs that only teach")
    parser.add_argument("--jobs", type=int, default=20, help="jobs that are judged")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=60, help="begin no job after that; the next call goes on"
    )
    parser.add_argument("--history", type=Path, help="where a campaign in pieces keeps what it has")
    options = parser.parse_args()

    from tests.faults import environment as env

    env.prepare_environment()
    environment = env.start_environment()
    try:
        return campaign(environment, options)
    finally:
        environment.stop()


def campaign(environment: Any, options: argparse.Namespace) -> int:
    from benchmarks.common import Scores
    from jobs.lifecycle import estimates
    from jobs.store.tables import EstimateRecord

    scores, begun = Scores(), time.monotonic()
    folder = lay_out_large()
    environment.start_worker("worker")
    environment.start_worker("checks", "checks")  # reads the data with the second base's tokenizer
    while not (workers := estimates.workers()):
        time.sleep(0.2)
        estimates.forget()
    scores.note(f"worker: {workers[0].info['machine']}")
    kept = json.loads(options.history.read_text()) if options.history and options.history.exists() else {}
    for record in kept.get("records", []):
        EstimateRecord(kind=record["kind"], job_id=record["job_id"], data=record["data"]).save()
    judged: list[dict[str, float]] = kept.get("judged", [])
    done, makers = int(kept.get("done", 0)), random.Random(options.seed)  # noqa: S311  sizes of jobs, no secrets
    for number in range(options.teach + options.jobs):
        made = draw(makers, number)
        if number < done or time.monotonic() - begun > 60 * options.minutes:
            continue
        found = run(made, folder, scores, teaches=number < options.teach)
        judged += [found] if number >= options.teach else []
        if options.history:
            options.history.write_text(
                json.dumps({"records": all_records(), "judged": judged, "done": number + 1})
            )
    return verdict(scores, judged) if judged else 0


def verdict(scores: Any, judged: list[dict[str, float]]) -> int:
    count = len(judged)
    errors = [abs(j["p50"] / j["actual"] - 1) for j in judged]
    memory = [abs(j["memory"] / j["peak"] - 1) for j in judged]
    under = sum(j["actual"] <= j["p90"] for j in judged)
    scores.add("under P90, of 20", 20 * under / count, 18, 1.0)
    scores.add(
        "P90 over P50, widest", max(j["p90"] / j["p50"] for j in judged), 1.35, 1.0, less_is_better=True
    )
    scores.add("error of P50, median", statistics.median(errors), 0.10, 1.0, less_is_better=True)
    scores.add("error of peak memory, largest", max(memory), 0.05, 1.0, less_is_better=True)
    scores.note(
        f"{under} of {count} under P90; error of P50 at most {max(errors):.0%}; of memory in the middle {statistics.median(memory):.1%}"
    )
    return scores.end()


# --- jobs of varied size -----------------------------------------------------------------------------


def draw(some: random.Random, number: int) -> dict[str, Any]:
    """Always the same numbers of draws, so that a campaign in pieces makes the same jobs."""
    base = LARGE if number % 5 == 4 else "starter"
    method = "lora" if some.random() < 0.35 else "full"
    rows, words = some.choice((60, 120, 250, 500)), some.choice((8, 20, 45, 90))
    batch, held = some.choice((4, 8, 16)), some.choice((0.0, 0.1))
    # twenty times the parameters: few tokens at once, or the rehearsal alone takes a minute
    if base == LARGE:
        words, batch = min(words, 20), min(batch, 4)
    return {
        "base": base,
        "rows": rows,
        "words": words,
        "seconds": some.uniform(*SECONDS),
        "seed": some.randrange(10**6),
        "settings": {"method": method, "batch_size": batch, "validation_fraction": held},
    }


def text_of(made: dict[str, Any]) -> bytes:
    some = random.Random(made["seed"])  # noqa: S311
    lines = []
    for _ in range(made["rows"]):
        asked, answered = (max(1, int(some.lognormvariate(0, 0.5) * made["words"])) for _ in range(2))
        words = [" ".join(str(some.randrange(1000)) for _ in range(n)) for n in (asked, answered)]
        lines.append(json.dumps({"prompt": words[0] + "\n", "completion": words[1]}))
    return "\n".join(lines).encode()


def lay_out_large() -> Path:
    """A model of DistilGPT-2's shape where the Hub's client keeps what it fetched, with numbers for words."""
    from benchmarks.training import lay_out

    home = Path(os.environ["HF_HOME"]) / "hub" / f"models--{LARGE}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    lay_out(snapshot, {"n_layer": 6, "n_embd": 768, "n_head": 12}, examples=1)
    return snapshot


def run(made: dict[str, Any], large: Path, scores: Any, *, teaches: bool) -> dict[str, float]:
    from jobs.datasets import datasets
    from jobs.lifecycle import estimates, transitions
    from tests.faults import environment as env
    from training.data.summary import Summary
    from training.plan import catalog
    from training.plan.auto_settings import resolve
    from training.plan.config import parse
    from training.report.report import report
    from training.text.encode import EncodingOptions
    from training.text.tokenizer import Tokenizer

    base = catalog.find(made["base"])
    assert base is not None
    path = Path(os.environ["LLMTUNER_TEST_DIR"]) / "rows.jsonl"
    path.write_bytes(text_of(made))
    tokenizer = Tokenizer.load(base.folder or large)
    counted = report(path, tokenizer, EncodingOptions(base.context))
    dataset = datasets.receive(OWNER, "rows.jsonl", iter([path.read_bytes()]))
    datasets.finish_check(OWNER, dataset.dataset_id, "ready", summary=counted, format=counted["format"])
    summary, on = Summary.from_dict(counted), estimates.machine()

    def estimated(epochs: float) -> Any:
        settings, _ = resolve(parse(made["settings"] | {"epochs": epochs}), summary, base, on)
        return estimates.estimate(base, settings, summary, on)

    estimates.forget()
    epochs = 1.0
    for _ in range(6):  # to take about as long as wanted
        epochs = min(50.0, max(0.1, epochs * made["seconds"] / estimated(epochs).seconds_p50))
    epochs = round(epochs, 1)
    before = estimated(epochs)
    asked = made["settings"] | {"epochs": epochs}
    job = transitions.submit(
        OWNER, transitions.JobRequest(base=base.id, dataset_id=dataset.dataset_id, settings=asked)
    )
    job = env.wait_ended(job.job_id, 400, OWNER)
    assert job.status == "succeeded", job.message
    actual, peak = job.ended_at - job.started_at, float(job.metrics["memory"])
    while not any(r["job_id"] == job.job_id for r in estimates.records(on)):
        time.sleep(0.1)
    time.sleep(3)  # the next trainer warms up, as on a worker that has nothing to do
    scores.note(
        f"{'teaches' if teaches else 'judged'}: {base.id} {made['settings']['method']} {summary.examples} × {summary.tokens // summary.examples} tokens, "
        f"{epochs:g} epochs of {made['settings']['batch_size']}: P50 {before.seconds_p50:.1f}, P90 {before.seconds_p90:.1f}, took {actual:.1f} s "
        f"({before.seconds_p50 / actual - 1:+.0%}); memory {before.memory / peak - 1:+.1%} of {peak / 1e9:.2f} GB"
    )
    return {
        "p50": before.seconds_p50,
        "p90": before.seconds_p90,
        "actual": actual,
        "memory": before.memory,
        "peak": peak,
    }


def all_records() -> list[dict[str, Any]]:
    from jobs.lifecycle import estimates
    from jobs.store.tables import EstimateRecord

    kinds = (estimates.kind_of(estimates.machine()),)
    return [
        {"kind": r.kind, "job_id": r.job_id, "data": r.data}
        for kind in kinds
        for r in EstimateRecord.query(kind)
    ]


if __name__ == "__main__":
    sys.exit(main())
