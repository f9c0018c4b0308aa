"""The learning rate over the steps."""

from __future__ import annotations

import pytest

from training.engine.schedule import learning_rate


def curve(schedule: str, warmup: float = 0.1, total: int = 100) -> list[float]:
    return [learning_rate(step, total, 1.0, schedule, warmup) for step in range(total)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_it_rises_to_the_peak_and_is_never_zero(schedule: str) -> None:
    rates = curve(schedule)
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == 1.0
    assert min(rates) > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_it_never_rises_again_and_ends_near_zero(schedule: str) -> None:
    falling = curve(schedule)[10:]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.06


def test_constant_stays_constant() -> None:
    assert set(curve("constant")[10:]) == {1.0}


def test_wsd_decays_in_the_last_fifth() -> None:
    rates = curve("wsd", warmup=0)
    assert rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5)


def test_warmup_can_be_a_number_of_steps() -> None:
    assert curve("linear", warmup=10) == curve("linear", warmup=0.1)


def test_one_step_is_enough() -> None:
    assert learning_rate(0, 1, 0.5, "cosine", 0.5) == 0.5
