"""Function calling, learned from rows: `bin/bench tools`, against TRL.

    bin/bench tools [--quick] [--threads N] [--only full|lora] [--folder FOLDER]

SmolLM2-135M-Instruct, whose chat template cannot express tools, is tuned on generated rows (function_calls.py) by our
trainer and by TRL: the same weights, rows, order, rendering and hyperparameters, fully and with LoRA. Then the base and the
four tuned models are asked the held-out prompts through /v1 with `tools=` by the `openai` client, greedily and without
constrained decoding. Goals: ours is at most 3 points below TRL in calls that can be parsed and in those whose function and
arguments are all as expected. Both columns are percentages; TRL's is shown less the 3 points. `--folder` keeps the models.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import function_calls
from benchmarks.common import LLAMA_LINEAR, ROOT, Scores
from benchmarks.function_calls import Row, call_of

BASE = ROOT / ".tools" / "smollm2"
PEERS = ROOT / ".bench" / "bin" / "python"
REVISION = "0" * 40
AT_ONCE = 8  # requests in flight
POINTS = 3.0  # that ours may be below TRL

SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "schedule": "linear",
    "warmup": 0,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "dropout": 0.0,
    "sequence_length": 512,
    "validation_fraction": 0,
    "seed": 0,
    "checkpoint_every_s": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": "none", "learning_rate": 2e-4},
    "lora": {
        "adapter": "lora",
        "learning_rate": 1e-3,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_targets": LLAMA_LINEAR,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench tools")
    parser.add_argument(
        "--quick", action="store_true", help="16 rows and 16 prompts: whether everything works, not how well"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=list(METHODS), help="one of the two methods")
    parser.add_argument("--folder", type=Path, help="keep the models and answers here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["JOBS_MAX_GENERATIONS_PER_OWNER"] = str(AT_ONCE)
    from tests.faults import environment as env

    env.prepare_environment()
    scores = Scores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = function_calls.generate(0, *((16, 16) if options.quick else (120, 96)))
        methods = [options.only] if options.only else list(METHODS)
        models = {"base": BASE}
        for method in methods:
            models |= trained(scores, folder, method, train)
        answers = measure(scores, folder, models, held_out)
    for method in methods:
        ours, theirs = answers[f"ours-{method}"], answers[f"trl-{method}"]
        for what in ("parsed", "exact"):
            goal = max(getattr(theirs, what) - POINTS, 0.1)
            scores.add(f"{what}/{method} (%), TRL - {POINTS:.0f}", getattr(ours, what), goal, 1.0)
    return scores.end()


# --- training ----------------------------------------------------------------------------------------


def trained(scores: Scores, folder: Path, method: str, rows: list[Row]) -> dict[str, Path]:
    """The models that our trainer and TRL make of the rows."""
    from training.engine.packing import example_at

    settings = SETTINGS | METHODS[method]
    work = folder / f"ours-{method}"
    function_calls.write(folder / "rows.jsonl", rows)
    run = {
        "base": str(BASE),
        "train_file": str(folder / "rows.jsonl"),
        "work_dir": str(work),
        "settings": settings,
        "rehearse": False,
    }
    (folder / "run.json").write_text(json.dumps(run))
    command(scores, f"ours, {method}", sys.executable, "-m", "training", "train", str(folder / "run.json"))

    in_order = [rows[example_at(at, settings["seed"], len(rows))] for at in range(len(rows))]
    function_calls.write(folder / "ordered.jsonl", in_order)
    out = folder / f"trl-{method}"
    peer = {
        "base": str(BASE),
        "tokenizer": str(work / "final"),  # for its chat template
        "rows": str(folder / "ordered.jsonl"),
        "out": str(out),
        "settings": settings,
    }
    (folder / "peer.json").write_text(json.dumps(peer))
    script = ROOT / "benchmarks" / "contenders" / "sft.py"
    command(scores, f"TRL, {method}", str(PEERS), str(script), str(folder / "peer.json"))
    compare_examples(scores, method, folder / "ordered.jsonl", Path(f"{out}.ids.json"))
    return {f"ours-{method}": work / "final", f"trl-{method}": out}


def command(scores: Scores, name: str, *argv: str) -> None:
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    scores.note(f"{name}: trained in {time.perf_counter() - started:.0f} s")


def compare_examples(scores: Scores, method: str, rows: Path, theirs: Path) -> None:
    """How many rows are the same tokens with the same loss mask in both programs."""
    from training.text.encode import EncodingOptions, examples
    from training.text.tokenizer import Tokenizer

    encoded = examples(rows, Tokenizer.load(BASE), EncodingOptions(SETTINGS["sequence_length"]))
    ours = [[e.ids, [i if m else -100 for i, m in zip(e.ids, e.mask, strict=True)]] for e in encoded]
    peers = json.loads(theirs.read_text())
    same = sum(mine == other for mine, other in zip(ours, peers, strict=True))
    scores.add(f"rows with equal tokens/{method}", same, len(ours), 1.0)


# --- asking ------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """What a model answered, in percent of the prompts."""

    parsed: float  # of the prompts that need a call: it made one
    function: float  # … of the right function
    exact: float  # … with exactly the right arguments
    plain: float  # of the prompts that need none: it made none


def measure(scores: Scores, folder: Path, models: dict[str, Path], rows: list[Row]) -> dict[str, Answers]:
    """Starts the studio, asks each model every prompt, and prints how each did."""
    import openai

    from tests.conftest import Studio
    from tests.faults import environment as env

    for name, path in models.items():
        in_hub_cache(f"bench/{name}", path)
    environment = env.start_environment()
    logging.disable(logging.WARNING)
    studio = Studio(os.environ["PUBLIC_URL"], environment.folder)
    answers = {}
    try:
        key = make_key([f"bench/{name}" for name in models])
        studio.start_web()
        environment.start_worker("inference", queue="inference")
        client = openai.OpenAI(base_url=f"{studio.url}/v1", api_key=key, timeout=600, max_retries=10)
        for name in models:
            started = time.perf_counter()
            given = answers_of(client, f"bench/{name}", rows)
            took = time.perf_counter() - started
            (folder / f"{name}.answers.json").write_text(json.dumps(given, indent=1))
            answers[name] = judge(rows, given)
            figures = ", ".join(f"{what} {value:.1f}" for what, value in vars(answers[name]).items())
            scores.note(f"{name:<10} {figures} ({took:.0f} s)")
    finally:
        studio.stop()
        environment.stop()
    return answers


def judge(rows: list[Row], given: list[dict[str, Any]]) -> Answers:
    expected = [call_of(row) for row in rows]
    calls = [(want, answer["calls"]) for want, answer in zip(expected, given, strict=True) if want]
    plain = [answer["calls"] for want, answer in zip(expected, given, strict=True) if not want]

    def percent(hits: list[bool]) -> float:
        return 100 * sum(hits) / len(hits)

    return Answers(
        percent([bool(made) for _, made in calls]),
        percent([len(made) == 1 and made[0][0] == want[0] for want, made in calls]),
        percent([made == [list(want)] for want, made in calls]),
        percent([not made for made in plain]),
    )


def answers_of(client: Any, model: str, rows: list[Row]) -> list[dict[str, Any]]:
    def one(row: Row) -> dict[str, Any]:
        completion = client.chat.completions.create(
            model=model, messages=row["messages"][:-1], tools=row["tools"], temperature=0, max_tokens=64
        )
        message = completion.choices[0].message
        calls = [[c.function.name, json.loads(c.function.arguments)] for c in message.tool_calls or ()]
        return {"prompt": row["messages"][0]["content"], "text": message.content, "calls": calls}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, rows))


def snapshot_of(name: str) -> Path:
    return Path(os.environ["HF_HOME"], "hub", "models--" + name.replace("/", "--"), "snapshots", REVISION)


def in_hub_cache(name: str, model: Path) -> None:
    """Links a model into the cache of the Hub's client, like one that was downloaded."""
    snapshot = snapshot_of(name)
    snapshot.mkdir(parents=True)
    main = snapshot.parents[1] / "refs" / "main"
    main.parent.mkdir()
    main.write_text(REVISION)
    for file in model.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file.resolve())


def make_key(names: list[str]) -> str:
    """An API key of a user who has added the models, as if they had been checked."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    from accounts import api_keys
    from jobs.store.tables import HubModel
    from tests.factories import make_user
    from training.plan import catalog

    user = make_user("bench")
    for name in names:
        described = catalog.describe(snapshot_of(name), id=name).as_dict()
        HubModel(user.owner_id, name, snapshot=described | {"revision": REVISION}).save()
    return str(api_keys.create(user, "bench", ["inference"])[1])


if __name__ == "__main__":
    sys.exit(main())
