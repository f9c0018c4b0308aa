"""Each warning about a job before it starts, and when it is not shown."""

from __future__ import annotations

from typing import Any

import pytest

from training.data.summary import Summary
from training.plan import catalog
from training.plan.config import parse
from training.plan.warnings import Planned, warnings


def titles(examples: int = 100, validation_rows: int = 0, leaked: int = 0, **settings: Any) -> list[str]:
    base = catalog.find("starter")
    assert base
    values = {"validation_fraction": 0.1, "batch_size": 8, "epochs": 3, "precision": "fp32"} | settings
    summary = Summary(examples=examples, tokens=10 * examples, trained_tokens=5 * examples, longest=10)
    planned = Planned(
        parse(values), base, catalog.this_machine(), summary, validation_rows=validation_rows, leaked=leaked
    )
    return [warning.title for warning in warnings(planned)]


def test_an_ordinary_job_has_no_warnings() -> None:
    assert titles() == []


def test_early_stopping_without_held_out_examples() -> None:
    settings = {"early_stopping_patience": 2, "validation_fraction": 0}
    assert "Early stopping has no effect" in titles(**settings)
    assert titles(validation_rows=9, **settings) == []


def test_a_validation_file_that_is_trained_on() -> None:
    title = "Every validation row is also in the training dataset"
    assert titles(validation_rows=9, leaked=9) == [title]
    assert titles(validation_rows=9, leaked=8) == []


@pytest.mark.parametrize("settings", [{"batch_size": 101}, {"batch_size": None, "batch_tokens": 1001}])
def test_a_batch_larger_than_the_data(settings: dict[str, Any]) -> None:
    assert "The batch is larger than the data" in titles(**settings)
