"""Examples, their order, and the rows they are packed into."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from training.engine.packing import Examples, example_at, hold_out, plan_steps, split
from training.models.batch import pack


def some(lengths: list[int], seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples.of(
        SimpleNamespace(ids=rng.integers(0, 1000, n).tolist(), mask=[0] + [1] * (n - 1)) for n in lengths
    )


def test_a_row_keeps_documents_apart() -> None:
    examples = some([3, 5])
    row = pack([examples[0], examples[1]])
    assert row.bounds == [(0, 3), (3, 8)]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row.loss_positions.tolist() == [0, 1, 3, 4, 5, 6]
    assert row.targets.tolist() == row.ids[[1, 2, 4, 5, 6, 7]].tolist()


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    row = pack([(np.arange(4, dtype=np.int32), np.ones(4, np.uint8))] * 2)
    assert row.loss_positions.tolist() == [0, 1, 2, 4, 5, 6]


def test_trained_tokens_equal_those_of_the_rows() -> None:
    examples = some([3, 1, 7, 2])
    assert examples.trained().tolist() == [len(pack([examples[i]]).targets) for i in range(4)]


def test_every_document_is_in_exactly_one_row_within_the_limit() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 40).tolist()
    rows = split(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(40))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


def test_a_document_longer_than_the_limit_gets_its_own_row() -> None:
    assert sorted(split([100, 10, 10], 64), key=len) == [[0], [1, 2]]


def test_rows_can_be_split_among_processes() -> None:
    assert len(split([10] * 8, 1000, parts=2)) == 2


def test_each_epoch_has_every_example_once_in_its_own_order() -> None:
    first, second = ([example_at(at, 5, 20) for at in range(e * 20, e * 20 + 20)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_order_depends_on_the_seed() -> None:
    assert [example_at(i, 1, 50) for i in range(50)] != [example_at(i, 2, 50) for i in range(50)]


def test_steps_span_epochs_and_the_last_takes_the_rest() -> None:
    ends = plan_steps(np.full(10, 5), 0, epochs=2.5, max_steps=None, batch_size=4, batch_tokens=None)
    assert ends.tolist() == [4, 8, 12, 16, 20, 24, 25]


def test_steps_can_be_filled_with_tokens() -> None:
    ends = plan_steps(np.full(10, 5), 0, epochs=1, max_steps=None, batch_size=None, batch_tokens=16)
    assert ends.tolist() == [3, 6, 9, 10]


def test_max_steps_wins_over_epochs() -> None:
    ends = plan_steps(np.full(10, 5), 0, epochs=None, max_steps=7, batch_size=4, batch_tokens=None)
    assert ends.tolist() == [4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_held_out_examples_are_never_trained_on(fraction: float) -> None:
    once = some([4, 9, 6, 3, 8, 5, 7, 10, 12, 11])
    twice = once.take([*range(10), *range(10)])  # every example has a twin
    train, held = hold_out(twice, fraction, seed=1)
    trained = {train[i][0].tobytes() for i in range(len(train))}
    assert len(held) >= 2
    assert not trained & {held[i][0].tobytes() for i in range(len(held))}


def test_holding_out_does_not_depend_on_the_order() -> None:
    examples = some([4, 9, 6, 3, 8, 5, 7, 10, 12, 11])
    _, one = hold_out(examples, 0.3, seed=1)
    _, two = hold_out(examples.take(range(9, -1, -1)), 0.3, seed=1)
    assert {one[i][0].tobytes() for i in range(3)} == {two[i][0].tobytes() for i in range(3)}


def test_nothing_is_held_out_if_all_examples_are_equal() -> None:
    train, held = hold_out(some([5]).take([0] * 8), 0.25, seed=0)
    assert (len(train), len(held)) == (8, 0)
