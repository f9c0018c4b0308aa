"""Each metric has its published values; which one is shown depends on the task."""

from __future__ import annotations

import pytest

from training.plan.metrics import (
    METRICS,
    METRICS_OF,
    Answer,
    answers_scored,
    exact_match,
    is_json,
    label_match,
    scores,
    table,
    token_f1,
    tool_call_match,
)
from training.plan.tasks import TASKS
from training.text.call_forms import FORMS, Call


@pytest.mark.parametrize(
    ("expected", "generated", "f1"),
    [
        ("The Norman people", "Normans people", 1 / 2),  # 1 of 2 words and of 2
        ("in the 10th and 11th centuries", "10th century", 2 * (1 / 2) * (1 / 5) / (1 / 2 + 1 / 5)),
        ("Denver Broncos", "the denver broncos!", 1.0),
        ("a cat cat", "cat", 2 / 3),  # repeated words count as often as in both
        ("moon", "sun", 0.0),
        ("", "", 1.0),
        ("", "sun", 0.0),
        ("the", "an", 1.0),  # nothing is left of either
    ],
)
def test_token_f1_has_the_values_of_squads_script(expected: str, generated: str, f1: float) -> None:
    assert token_f1(expected, generated) == pytest.approx(f1)
    assert token_f1(generated, expected) == pytest.approx(f1)


def test_exact_match_ignores_only_white_space_around_the_text() -> None:
    assert exact_match("moon", " moon\n") == 1
    assert exact_match("moon", "Moon") == exact_match("moon", "the moon") == 0


def test_a_label_that_the_training_data_does_not_have_is_a_wrong_answer() -> None:
    assert label_match(" spam", "spam", {"spam", "ham"}) == 1
    assert label_match(" spam", "ham", {"spam", "ham"}) == 0
    assert label_match("egg", "egg", {"spam", "ham"}) == 0


@pytest.mark.parametrize("text", ["{}", ' [1, "a"]\n', '{"a": {"b": null}}'])
def test_objects_and_arrays_are_json(text: str) -> None:
    assert is_json(text)


@pytest.mark.parametrize(
    "text", ["", "moon", "5", '"a"', "{'a': 1}", '{"a": NaN}', '{"a": 1} done', "[" * 99_999]
)
def test_anything_else_is_not_json(text: str) -> None:
    assert not is_json(text)


def test_calls_match_by_function_and_arguments_in_any_order() -> None:
    one, two = Call("look_up", {"what": "moon", "n": 1}), Call("stop", {})
    assert tool_call_match([one, two], [two, Call("look_up", {"n": 1.0, "what": "moon"})]) == 1
    for wrong in ([one], [one, one, two], [one, Call("stop", {"now": True})], [two, Call("look_up", {})], []):
        assert tool_call_match([one, two], wrong) == 0
    for value in ("1", True, 2):
        assert tool_call_match([one], [Call("look_up", {"what": "moon", "n": value})]) == 0


def test_every_task_has_its_metrics_and_every_metric_a_task() -> None:
    assert METRICS_OF.keys() == TASKS.keys()
    assert {name for names in METRICS_OF.values() for name in names} == METRICS.keys()


def test_a_task_shows_only_metrics_that_apply() -> None:
    answers = [Answer('{"a": 1}', '{"a": 1}'), Answer('{"a": 2}', "two")]
    assert scores("instruction", answers) == {"exact_match": 0.5, "token_f1": 0.5}
    assert scores("instruction", answers, json_answers=True)["valid_json"] == 0.5
    assert scores("chat", answers) == {"token_f1": 0.5}
    assert scores("classification", answers, labels={'{"a": 1}'}) == {"label_accuracy": 0.5}
    assert scores("text", answers) == scores("tools", answers) == scores("chat", []) == {}


def test_tool_calls_are_read_in_the_form_of_the_model() -> None:
    form = next(
        form for form in FORMS if form.parse('<tool_call>{"name": "f", "arguments": {}}</tool_call>')[1]
    )
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    answers = [Answer(call, f"Sure. {call}"), Answer(call, call.replace("1", "2")), Answer(call, "no")]
    assert scores("tools", answers, form=form) == {"tool_call_match": pytest.approx(1 / 3)}


def test_longer_answers_are_scored_in_smaller_numbers() -> None:
    assert answers_scored(5, 120) == 5
    assert answers_scored(1000, 2) == 100
    assert answers_scored(1000, 128) == 30


def test_a_page_shows_stored_metrics_in_order_and_leaves_out_unknown_ones() -> None:
    stored = {"tuned": {"token_f1": 0.5, "exact_match": 0.25, "later": 1}, "base": {"exact_match": 0}}
    assert [(label, base, tuned) for label, _, base, tuned in table(stored)] == [
        ("Exact match", 0, 0.25),
        ("Token F1", None, 0.5),
    ]
    assert table(None) == table({}) == []
