"""`bin/bench estimate`: the estimate that the form shows, compared with what the job then takes.

    bin/bench estimate [--teach 12] [--jobs 20] [--seed 1] [--history FILE --minutes 7]

Jobs of varied size (base model, rows, length, epochs, batch size, method) run on a real worker, from submission to the
stored model. The first ones only calibrate the estimates; for each of the others the estimate is computed as the form
does it, and afterwards compared with the time from claim to end and with the trainer's peak memory. The second base model
has the shape of DistilGPT-2 with random weights, since the time does not depend on their values. `--history` keeps the
results in a file, so that a long campaign may be run in several calls.
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
SECONDS = (10.0, 16.0)  # target duration of a job, by its estimate


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench estimate")
    parser.add_argument("--teach", type=int, default=12, help="jobs that only calibrate the estimates")
    parser.add_argument("--jobs", type=int, default=20, help="jobs that are measured")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=60, help="start no job after this time; the next call continues"
    )
    parser.add_argument("--history", type=Path, help="file in which the results of several calls are kept")
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

    scores, started = Scores(), time.monotonic()
    folder = prepare_large_base()
    environment.start_worker("worker")
    environment.start_worker("checks", "checks")  # counts tokens with the second base's tokenizer
    while not (workers := estimates.workers()):
        time.sleep(0.2)
        estimates.forget()
    scores.note(f"worker: {workers[0].info['machine']}")
    kept = json.loads(options.history.read_text()) if options.history and options.history.exists() else {}
    for record in kept.get("records", []):
        EstimateRecord(kind=record["kind"], job_id=record["job_id"], data=record["data"]).save()
    measured: list[dict[str, float]] = kept.get("judged", [])
    done, rng = int(kept.get("done", 0)), random.Random(options.seed)  # noqa: S311  not for secrets
    for number in range(options.teach + options.jobs):
        job = draw(rng, number)
        if number < done or time.monotonic() - started > 60 * options.minutes:
            continue
        result = run(job, folder, scores, calibrating=number < options.teach)
        measured += [result] if number >= options.teach else []
        if options.history:
            options.history.write_text(
                json.dumps({"records": all_records(), "judged": measured, "done": number + 1})
            )
    return verdict(scores, measured) if measured else 0


def verdict(scores: Any, measured: list[dict[str, float]]) -> int:
    count = len(measured)
    errors = [abs(m["p50"] / m["actual"] - 1) for m in measured]
    memory = [abs(m["memory"] / m["peak"] - 1) for m in measured]
    under = sum(m["actual"] <= m["p90"] for m in measured)
    scores.add("under P90, of 20", 20 * under / count, 18, 1.0)
    scores.add(
        "P90 over P50, widest", max(m["p90"] / m["p50"] for m in measured), 1.35, 1.0, less_is_better=True
    )
    scores.add("error of P50, median", statistics.median(errors), 0.10, 1.0, less_is_better=True)
    scores.add("error of peak memory, largest", max(memory), 0.05, 1.0, less_is_better=True)
    scores.note(
        f"{under} of {count} under P90; error of P50 at most {max(errors):.0%}; median error of memory {statistics.median(memory):.1%}"
    )
    return scores.end()


# --- jobs of varied size -----------------------------------------------------------------------------


def draw(rng: random.Random, number: int) -> dict[str, Any]:
    """A job of random size. Draws the same number of times for each, so that a campaign in several calls has the same jobs."""
    base = LARGE if number % 5 == 4 else "starter"
    method = "lora" if rng.random() < 0.35 else "full"
    rows, words = rng.choice((60, 120, 250, 500)), rng.choice((8, 20, 45, 90))
    batch, held = rng.choice((4, 8, 16)), rng.choice((0.0, 0.1))
    # twenty times the parameters: small batches, or the rehearsal alone takes a minute
    if base == LARGE:
        words, batch = min(words, 20), min(batch, 4)
    return {
        "base": base,
        "rows": rows,
        "words": words,
        "seconds": rng.uniform(*SECONDS),
        "seed": rng.randrange(10**6),
        "settings": {"method": method, "batch_size": batch, "validation_fraction": held},
    }


def dataset_content(sizes: dict[str, Any]) -> bytes:
    rng = random.Random(sizes["seed"])  # noqa: S311
    lines = []
    for _ in range(sizes["rows"]):
        lengths = (max(1, int(rng.lognormvariate(0, 0.5) * sizes["words"])) for _ in range(2))
        words = [" ".join(str(rng.randrange(1000)) for _ in range(n)) for n in lengths]
        lines.append(json.dumps({"prompt": words[0] + "\n", "completion": words[1]}))
    return "\n".join(lines).encode()


def prepare_large_base() -> Path:
    """Puts a model with DistilGPT-2's shape into the cache of the Hub's client. Its words are numbers."""
    from benchmarks.training import lay_out

    home = Path(os.environ["HF_HOME"]) / "hub" / f"models--{LARGE}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    lay_out(snapshot, {"n_layer": 6, "n_embd": 768, "n_head": 12}, examples=1)
    return snapshot


def run(sizes: dict[str, Any], large: Path, scores: Any, *, calibrating: bool) -> dict[str, float]:
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

    base = catalog.find(sizes["base"])
    assert base is not None
    path = Path(os.environ["LLMTUNER_TEST_DIR"]) / "rows.jsonl"
    path.write_bytes(dataset_content(sizes))
    tokenizer = Tokenizer.load(base.folder or large)
    counted = report(path, tokenizer, EncodingOptions(base.context))
    dataset = datasets.receive(OWNER, "rows.jsonl", iter([path.read_bytes()]))
    datasets.finish_check(OWNER, dataset.dataset_id, "ready", summary=counted, format=counted["format"])
    summary, on = Summary.from_dict(counted), estimates.machine()

    def estimated(epochs: float) -> Any:
        settings, _ = resolve(parse(sizes["settings"] | {"epochs": epochs}), summary, base, on)
        return estimates.estimate(base, settings, summary, on)

    estimates.forget()
    epochs = 1.0
    for _ in range(6):  # so that it takes about the target duration
        epochs = min(50.0, max(0.1, epochs * sizes["seconds"] / estimated(epochs).seconds_p50))
    epochs = round(epochs, 1)
    before = estimated(epochs)
    chosen = sizes["settings"] | {"epochs": epochs}
    job = transitions.submit(
        OWNER, transitions.JobRequest(base=base.id, dataset_id=dataset.dataset_id, settings=chosen)
    )
    job = env.wait_ended(job.job_id, 400, OWNER)
    assert job.status == "succeeded", job.message
    actual, peak = job.ended_at - job.started_at, float(job.metrics["memory"])
    while not any(r["job_id"] == job.job_id for r in estimates.records(on)):
        time.sleep(0.1)
    time.sleep(3)  # the next trainer is prewarmed, as on an idle worker
    scores.note(
        f"{'calibration' if calibrating else 'measured'}: {base.id} {sizes['settings']['method']} {summary.examples} × {summary.tokens // summary.examples} tokens, "
        f"{epochs:g} epochs of {sizes['settings']['batch_size']}: P50 {before.seconds_p50:.1f}, P90 {before.seconds_p90:.1f}, took {actual:.1f} s "
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
