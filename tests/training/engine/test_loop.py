"""The events a run emits, and the files it writes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.running import Event, Runner, losses, of
from training.command import encode
from training.engine import device, objectives
from training.engine.evaluate import verdict
from training.models.batch import Batch
from training.plan.events import EXIT, MAX_LINE_BYTES, REASONS


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("loop"), steps=12, eval_every=6)


@pytest.fixture(scope="module")
def events(runner: Runner) -> list[Event]:
    return runner.train()


def test_phases_are_emitted_in_order(events: list[Event]) -> None:
    phases = [phase for phase, _ in groupby(e["phase"] for e in of(events, "phase"))]
    # the base model is scored first, and the trained one before the export
    assert phases[:4] == ["preparing", "evaluating", "rehearsing", "training"]
    assert phases[-2:] == ["evaluating", "exporting"]
    assert set(phases[4:-1]) == {"training", "evaluating"}


def test_the_plan_event_has_all_settings_resolved(events: list[Event]) -> None:
    plan = of(events, "plan")[0]
    settings = plan["settings"]
    open_fields = {name for name, value in settings.items() if value is None}
    assert open_fields <= {"epochs", "batch_tokens", "lora_targets"}
    assert plan["total_steps"] == 12
    assert plan["examples"] + plan["held_out"] == 67
    assert plan["trainable"] == plan["parameters"]


def test_every_step_has_a_metric_event(events: list[Event]) -> None:
    metrics = of(events, "metric")
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert all(float.fromhex(m["loss_hex"]) == m["loss"] for m in metrics)
    last = metrics[-1]
    assert last["eta_s"] >= 0
    assert last["memory"] > 1 << 20
    assert 0 < last["gemm_share"] < 2
    assert last["tokens"] > metrics[0]["tokens"]


def test_it_learns(events: list[Event]) -> None:
    first, *_, last = of(events, "eval")
    assert (first["step"], last["step"]) == (0, 12)
    assert last["loss"] < first["loss"]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))


def test_samples_come_with_each_evaluation_including_that_of_the_base_model(events: list[Event]) -> None:
    assert [(s["step"], s["prompt"]) for s in of(events, "sample")] == [
        (0, "the cat"),
        (6, "the cat"),
        (12, "the cat"),
    ]


def test_the_estimate_covers_the_actual_time(events: list[Event]) -> None:
    estimate = of(events, "estimate")[0]
    assert 0 < estimate["seconds_p50"] < estimate["seconds_p90"]
    assert estimate["peak_memory"] > 0


def test_the_last_checkpoint_is_the_final_one(events: list[Event]) -> None:
    last = of(events, "checkpoint")[-1]
    assert (last["step"], last["final"]) == (12, True)
    assert {f["name"] for f in last["files"]} >= {"weights.safetensors", "manifest.json"}


def test_the_final_folder_matches_the_done_event_and_the_trained_model(events: list[Event]) -> None:
    done = of(events, "done")[0]
    folder = Path(done["path"])
    assert all((folder / f["name"]).stat().st_size == f["bytes"] for f in done["files"])
    assert done["fidelity"]["exact"] is True
    assert done["metrics"]["loss"] == of(events, "eval")[-1]["loss"]
    assert (done["step"], done["kept_step"], done["early"]) == (12, 12, False)


def test_the_verdict_is_emitted(events: list[Event]) -> None:
    verdict_event = of(events, "verdict")[0]
    assert verdict_event["helped"] == "yes"
    assert verdict_event["low"] <= verdict_event["fall"] <= verdict_event["high"]


def test_the_rehearsal_changes_nothing(runner: Runner, events: list[Event]) -> None:
    assert losses(runner.train("unrehearsed", rehearse=False)) == losses(events)


def test_another_seed_gives_other_losses(runner: Runner, events: list[Event]) -> None:
    assert losses(runner.train("seed", settings={"seed": 4})) != losses(events)


def test_accumulation_gives_the_same_training_as_one_large_row(runner: Runner, events: list[Event]) -> None:
    parts = of(runner.train("parts", settings={"dropout": 0, "micro_batch_tokens": 48}), "metric")
    whole = of(runner.train("whole", settings={"dropout": 0, "micro_batch_tokens": 4096}), "metric")
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], rel=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "constant", "wsd"])
def test_every_schedule_trains(runner: Runner, schedule: str) -> None:
    metrics = of(
        runner.train(schedule, settings={"schedule": schedule, "max_steps": 3, "eval_every": 0}), "metric"
    )
    assert len(metrics) == 3


def test_lora_trains_little_and_exports_a_whole_model(runner: Runner) -> None:
    events = runner.train(
        "lora", settings={"adapter": "lora", "lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
    )
    plan = of(events, "plan")[0]
    assert plan["trainable"] < plan["parameters"] / 5
    assert (plan["lora"]["layers"], plan["lora"]["of"]) == (8, 8)
    assert of(events, "eval")[-1]["loss"] < of(events, "eval")[0]["loss"]
    assert of(events, "done")[0]["fidelity"]["exact"] is True


def test_gradient_checkpointing_changes_nothing_but_memory(runner: Runner, events: list[Event]) -> None:
    assert losses(runner.train("checkpointed", settings={"gradient_checkpointing": True})) == losses(events)


def test_deterministic_mode_trains(runner: Runner, events: list[Event]) -> None:
    try:
        assert losses(runner.train("deterministic", settings={"deterministic": True})) == losses(events)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_learns_like_full_precision(
    runner: Runner, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code path of GPUs, except for the attention kernel."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    settings = {"method": method, "lora_dropout": 0.1, "gradient_checkpointing": method == "full"}
    full, half = (
        runner.train(f"{method}-{precision}", settings=settings | {"precision": precision})
        for precision in ("fp32", "bf16")
    )
    both = [[e["loss"] for e in of(events, "metric") + of(events, "eval")] for events in (full, half)]
    assert both[1] != both[0]
    assert both[1] == pytest.approx(both[0], rel=5e-3)
    done = of(half, "done")[0]
    assert done["fidelity"]["exact"] is True
    if method == "lora":  # frozen weights are exported unchanged
        base, final = (
            load_file(Path(f) / "model.safetensors") for f in (runner.values["base"], done["path"])
        )
        assert torch.equal(final["transformer.wte.weight"], base["transformer.wte.weight"])
        return
    last = of(runner.train("half-cut", stop_at=5, settings=settings | {"precision": "bf16"}), "checkpoint")[
        -1
    ]
    again = runner.train(
        "half-again", resume_from=last["path"], epoch=2, settings=settings | {"precision": "bf16"}
    )
    assert losses(again) == {step: loss for step, loss in losses(half).items() if step > 5}


def test_the_rehearsal_lowers_the_micro_batch_when_memory_is_short(
    runner: Runner, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised = objectives.OBJECTIVES["supervised"]

    def short_of_memory(model: Any, batch: Batch, scale: float) -> Any:
        if len(batch.ids) > 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return supervised.loss(model, batch, scale)

    monkeypatch.setitem(objectives.OBJECTIVES, "supervised", replace(supervised, loss=short_of_memory))
    emitted = runner.train("short", settings={"dropout": 0})
    assert 32 <= of(emitted, "estimate")[0]["micro_batch_tokens"] <= 50  # it began with 64
    assert [m["tokens"] for m in of(emitted, "metric")] == [m["tokens"] for m in of(events, "metric")]


def test_it_stops_early_and_keeps_the_best_weights(runner: Runner) -> None:
    settings = {
        "learning_rate": 0.5,
        "schedule": "constant",
        "early_stopping_patience": 2,
        "eval_every": 1,
        "max_steps": 40,
    }
    events = runner.train("early", settings=settings)
    evaluations = of(events, "eval")[1:]
    best = min(evaluations, key=lambda e: e["loss"])
    assert len(of(events, "metric")) < 40
    assert evaluations[-1]["step"] == best["step"] + 2
    done = of(events, "done")[0]
    assert done["metrics"]["loss"] == best["loss"]
    assert (done["step"], done["kept_step"], done["early"]) == (evaluations[-1]["step"], best["step"], True)
    card = (Path(done["path"]) / "README.md").read_text()
    assert f"stopped early at step {done['step']}; kept step {best['step']}" in card


def test_the_best_weights_are_those_of_their_step(runner: Runner) -> None:
    settings = {
        "learning_rate": 0.5,
        "schedule": "constant",
        "early_stopping_patience": 2,
        "eval_every": 1,
        "max_steps": 40,
    }
    events = runner.train("kept", settings=settings)
    best = of(events, "done")[0]["metrics"]
    again = runner.train(
        "judged", base=of(events, "done")[0]["path"], settings={"max_steps": 1, "eval_every": 0}
    )
    assert of(again, "eval")[0]["loss"] == pytest.approx(best["loss"], rel=1e-5)


def messages(events: list[Event]) -> str:
    return "\n".join(e["message"] for e in of(events, "log") if e["level"] == "warning")


def test_a_batch_larger_than_the_data_is_a_warning(runner: Runner) -> None:
    settings = {"batch_size": 500, "max_steps": None, "epochs": 3, "validation_fraction": 0, "eval_every": 0}
    assert "The batch is larger than the data" in messages(runner.train("batch", settings=settings))
    assert "The batch is larger" not in messages(
        runner.train("batch-6", settings=settings | {"batch_size": 6})
    )


def test_divergence_is_a_warning_before_the_end(runner: Runner, events: list[Event]) -> None:
    settings = {"learning_rate": 10.0, "schedule": "constant", "warmup": 0, "clip_norm": 0, "max_steps": 20}
    emitted = runner.train("diverges", settings=settings)
    warned = [i for i, e in enumerate(emitted) if "diverging" in str(e.get("message"))]
    assert len(warned) == 1
    assert any(e["t"] == "metric" for e in emitted[warned[0] + 1 :])
    assert "diverging" not in messages(events)


def test_a_small_file_without_held_out_examples_still_trains(runner: Runner) -> None:
    events = runner.train("none-held", settings={"validation_fraction": 0, "max_steps": 2, "eval_every": 0})
    assert not of(events, "eval")
    assert of(events, "done")


def test_batches_can_be_counted_in_tokens(runner: Runner) -> None:
    settings = {"batch_size": None, "batch_tokens": 64, "max_steps": None, "epochs": 1, "eval_every": 0}
    metrics = of(runner.train("tokens", settings=settings), "metric")
    sizes = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(metrics)]
    assert max(sizes) <= 64
    assert metrics[-1]["epoch"] == 1.0


def test_automatic_settings_come_with_their_reasons(runner: Runner) -> None:
    events = runner.train(
        "auto", settings={"learning_rate": None, "dropout": None, "max_steps": 1, "eval_every": 0}
    )
    reasons = of(events, "plan")[0]["reasons"]
    assert {"learning_rate", "dropout"} <= reasons.keys()


# ---- lines -------------------------------------------------------------------------------------------------


def test_an_event_has_no_number_that_json_lacks() -> None:
    event = json.loads(
        encode({"t": "metric", "loss": float("nan"), "lr": 0.1, "deep": {"x": float("inf"), "y": 1}})
    )
    assert event == {"t": "metric", "lr": 0.1, "deep": {"y": 1}}


def test_an_event_never_exceeds_the_line_limit() -> None:
    line = encode({"t": "sample", "step": 1, "prompt": "ж" * 50_000, "text": "\ud83d" * 50_000})
    assert len(line) <= MAX_LINE_BYTES
    assert json.loads(line)["step"] == 1


def test_every_reason_has_its_own_exit_code_and_sentence() -> None:
    assert len(set(EXIT.values())) == len(EXIT)
    assert all(r.sentence.endswith(".") and r.advice.endswith(".") for r in REASONS.values())
    assert all(r.user_fault == (10 <= r.exit < 20) for r in REASONS.values())


def test_the_verdict_can_be_no_or_unclear() -> None:
    assert verdict([1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.2])["helped"] == "no"
    assert verdict([1.0, 1.1, 0.9, 1.0], [1.1, 1.0, 0.9, 1.0])["helped"] == "unclear"
