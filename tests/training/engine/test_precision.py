"""Automatic precision on a CPU: measured once, on the run's own model and data, and kept for every attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.running import Runner, losses, of
from training.engine import device, precision
from training.engine.precision import Measured, choose


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("precision"), steps=6, eval_every=0, dropout=0.1)


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU with bf16 units, whose runs are long enough to measure."""
    for module in (device, precision):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(precision, "MIN_SECONDS", 0.0)
    return monkeypatch


@pytest.mark.parametrize(
    ("bf16", "expected", "why"),
    [
        (Measured(0.5, 3.001), "bf16", "2.00 times as fast"),
        (Measured(0.9, 3.0), "fp32", "only 1.11 times as fast"),
        (Measured(0.5, 3.1), "fp32", "changes the loss by 3.3%"),
        (Measured(0.5, float("nan")), "fp32", "changes the loss"),
    ],
)
def test_bf16_is_chosen_only_if_it_is_faster_with_the_same_loss(
    bf16: Measured, expected: str, why: str
) -> None:
    chosen, reason = choose(Measured(1.0, 3.0), bf16)
    assert chosen == expected
    assert why in reason


@pytest.mark.parametrize(("min_speedup", "expected"), [(0.0, "bf16"), (1000.0, "fp32")])
def test_the_run_computes_in_the_measured_precision(
    runner: Runner, bf16_units: pytest.MonkeyPatch, min_speedup: float, expected: str
) -> None:
    bf16_units.setattr(precision, "MIN_SPEEDUP", min_speedup)
    events = runner.train(f"measured-{expected}")
    assert losses(events) == losses(runner.train(expected, settings={"precision": expected}))
    plan = of(events, "plan")[0]
    assert plan["settings"]["precision"] == expected
    assert "measured" in plan["reasons"]["precision"]


def test_a_resumed_run_keeps_the_precision_of_its_first_attempt(
    runner: Runner, bf16_units: pytest.MonkeyPatch
) -> None:
    bf16_units.setattr(precision, "MIN_SPEEDUP", 0.0)
    whole = losses(runner.train("whole"))
    [*_, last] = of(runner.train("cut", stop_at=3), "checkpoint")
    bf16_units.setattr(precision, "MIN_SPEEDUP", 1000.0)
    again = runner.train("again", resume_from=last["path"], epoch=2)
    assert Path(last["path"]).is_dir()
    assert losses(again) == {step: loss for step, loss in whole.items() if step > 3}


def test_settings_submitted_before_the_measurement_existed_stay_in_fp32(
    runner: Runner, bf16_units: pytest.MonkeyPatch
) -> None:
    bf16_units.setattr(precision, "MIN_SPEEDUP", 0.0)
    events = runner.train("former", settings_schema=1)
    assert of(events, "plan")[0]["settings"]["precision"] == "auto"
    assert losses(events) == losses(runner.train("fp32-again", settings={"precision": "fp32"}))


def test_a_run_too_short_to_gain_is_not_measured(runner: Runner, bf16_units: pytest.MonkeyPatch) -> None:
    bf16_units.setattr(precision, "MIN_SECONDS", 1e9)
    plan = of(runner.train("short"), "plan")[0]
    assert plan["settings"]["precision"] == "fp32"
    assert "too short" in plan["reasons"]["precision"]
