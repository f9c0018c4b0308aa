"""The task is guessed from the rows, and a chosen task that contradicts them is refused."""

from __future__ import annotations

from typing import Any

import pytest

from training.data.row_schemas import Reader
from training.plan.config import ConfigError, parse, settings_hash
from training.plan.tasks import Counts, TaskCounts, describe, guess, refusal


def chat(*turns: tuple[str, str], **last: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1] |= last
    return {"messages": messages}


CALL = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}
QUESTION = ("user", "Is this spam?")
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "It was a dark night."}],
    "classification": [{"prompt": f"{i}?", "completion": ("spam", " ham")[i % 2]} for i in range(10)],
    "instruction": [{"instruction": f"Say {i}.", "output": str(i)} for i in range(10)],
    "chat": [chat(QUESTION, ("assistant", "No."), ("user", "Why?"), ("assistant", "It is from Bob."))] * 10,
    "tools": [chat(QUESTION, ("assistant", "No."))] * 9
    + [chat(QUESTION, ("assistant", ""), tool_calls=[CALL])],
}


def counts(records: list[dict[str, Any]]) -> Counts:
    read, counted = Reader("", {}), TaskCounts()
    for line, record in enumerate(records, 1):
        counted.add(read(line, record))
    return counted.as_dict()


@pytest.mark.parametrize("task", ROWS)
def test_the_task_is_guessed_from_the_rows(task: str) -> None:
    assert guess(counts(ROWS[task])) == task
    assert not refusal(task, counts(ROWS[task]))


def test_labels_in_conversations_are_a_classification_too() -> None:
    rows = [
        chat(("system", "Classify."), QUESTION, ("assistant", "yes" if i % 3 else "no")) for i in range(12)
    ]
    assert describe(None, counts(rows)) == {
        "name": "classification",
        "automatic": True,
        "text": "Automatic: classification, 2 labels",
    }


@pytest.mark.parametrize(
    "answers",
    [
        ["yes"] * 20,  # one label
        ["yes", "no", "maybe"] * 4,  # fewer than five rows of each
        ["yes", "no"] * 20 + ["No, because it is from a friend whom I have known for years."],
        [str(i % 51) for i in range(1000)],  # more than fifty labels
    ],
)
def test_other_answers_are_not_taken_for_labels(answers: list[str]) -> None:
    assert guess(counts([{"prompt": "?", "completion": answer} for answer in answers])) == "instruction"


def test_answers_that_are_not_trained_on_do_not_count() -> None:
    rows = [
        chat(QUESTION, ("assistant", ""), tool_calls=[CALL], weight=0),
        chat(QUESTION, ("assistant", "a"), ("user", "?"), ("assistant", "b"), weight=0),
    ]
    assert counts(rows)["calls"] == 0
    assert counts(rows)["labels"] == 1


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ("tools", "chat", "No answer in the rows calls a tool."),
        ("tools", "classification", "No answer in the rows calls a tool."),
        ("text", "chat", "not plain text"),
        ("chat", "text", "plain text without prompts and answers"),
        ("classification", "text", "plain text without prompts and answers"),
        ("chat", "classification", "to which no chat template is applied"),
    ],
)
def test_a_task_that_contradicts_the_rows_is_refused(task: str, rows: str, words: str) -> None:
    assert words in refusal(task, counts(ROWS[rows]))


def test_a_classification_with_almost_as_many_labels_as_rows_is_refused() -> None:
    many = counts([{"prompt": "?", "completion": str(i % 500)} for i in range(600)])
    assert "The 600 rows have 500 different answers" in refusal("classification", many)
    assert guess(many) == "instruction"
    more = counts([{"prompt": "?", "completion": str(i)} for i in range(3000)])
    assert "more than 1,000 different answers" in refusal("classification", more)
    assert not refusal(
        "classification", counts([{"prompt": "?", "completion": str(i % 90)} for i in range(200)])
    )


def test_datasets_from_before_the_counts_are_neither_guessed_nor_refused() -> None:
    assert guess({}) == "" == refusal("tools", {})
    assert describe(None, {}) == {}
    assert describe("tools", {}) == {"name": "tools", "automatic": False, "text": "Tools"}


def test_settings_without_a_task_are_stored_as_before() -> None:
    assert "task" not in parse({}).stored()
    assert "task" not in parse({"task": "auto"}).stored()
    assert (
        settings_hash(parse({}, 1), 1) == "7268a8318ee70575c12d79db9f2f1dcc9aa0c2b64231b648e541b2fc21cee9c4"
    )  # as the first schema hashed them


def test_a_chosen_task_is_stored_and_checked() -> None:
    assert parse(parse({"task": "tools"}).stored()).task == "tools"
    with pytest.raises(ConfigError, match="task: Choose one of chat, instruction"):
        parse({"task": "translation"})
