"""A run scores the answers to held-out prompts by its task, before and after training, without changing the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.running import Event, losses, of
from tests.training.tiny import write_model
from tests.training.tool_model import CONTROL, MISTRAL, TOOLS, write_tool_base
from training.command import train
from training.engine.loop import Stopped
from training.plan.events import Failure
from training.plan.run_file import Run

THINGS = ("cat", "moon", "mat")
SETTINGS = {
    "max_steps": 60,
    "learning_rate": 5e-3,
    "batch_size": 8,
    "dropout": 0.0,
    "validation_fraction": 0.25,
    "seed": 1,
}


def turn(role: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def call(what: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "look_up", "arguments": {"what": what}}}]


def row(task: str, number: int) -> dict[str, Any]:
    """The last word of the prompt says which answer is right, so it can be learned; calls are all alike."""
    thing = THINGS[number % len(THINGS)]
    prompt = f"{number} the {thing}?"
    if task == "classification":
        return {"prompt": prompt, "completion": f" {thing}"}
    if task == "instruction":
        return {"instruction": prompt, "output": f"the {thing} on the mat and looked at {number}"}
    if task == "text":
        return {"text": f"the {thing} sat on the mat and looked at {number} moon"}
    if task == "tools":
        return {
            "messages": [turn("user", prompt), turn("assistant", tool_calls=call("moon"))],
            "tools": TOOLS,
        }
    return {
        "messages": [
            turn("user", prompt),
            turn("assistant", f"the {thing}"),
            turn("user", "and?"),
            turn("assistant", f"it looked at {number}"),
        ]
    }


class Folder:
    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        tools = "tools" in rows[0]
        self.base = (
            write_tool_base(path / "base", MISTRAL, CONTROL)
            if tools
            else write_model(path / "base", context=512)
        )
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, work: str = "work", stop_when: Any = None, **changes: Any) -> list[Event]:
        events: list[Event] = []
        values = {
            "base": str(self.base),
            "train_file": str(self.path / "rows.jsonl"),
            "work_dir": str(self.path / work),
            "date": "2026-01-31",
        }
        run = Run.parse(values | changes | {"settings": SETTINGS | changes.get("settings", {})})
        stop = (lambda: stop_when(events)) if stop_when else (lambda: False)
        try:
            train(run, lambda t, **values: events.append({"t": t, **values}), stop)
        except Stopped:
            events.append({"t": "stopped"})
        return events


def scores_of(events: list[Event]) -> dict[str, Any]:
    return dict(of(events, "done")[0]["metrics"].get("scores", {}))


METRIC = {
    "chat": "token_f1",
    "instruction": "token_f1",
    "classification": "label_accuracy",
    "tools": "tool_call_match",
}


@pytest.mark.parametrize("task", METRIC)
def test_training_raises_the_metric_of_the_task(task: str, tmp_path: Path) -> None:
    events = Folder(tmp_path, [row(task, i) for i in range(48)]).train()
    assert of(events, "plan")[0]["task"]["name"] == task
    scores, name = scores_of(events), METRIC[task]
    assert scores["task"] == task
    assert scores["answers"] == (24 if task == "chat" else 12)  # both answers of each conversation
    assert scores["base"][name] < 0.5 < scores["tuned"][name]
    assert scores["base"].keys() == scores["tuned"].keys()
    assert scores.get("labels") == (3 if task == "classification" else None)
    card = (Path(of(events, "done")[0]["path"]) / "README.md").read_text()
    assert f"{scores['tuned'][name]:.1%}" in card
    assert any("held-out answers: " in e["message"] for e in of(events, "log"))


def test_plain_text_has_no_answers_to_score(tmp_path: Path) -> None:
    events = Folder(tmp_path, [row("text", i) for i in range(48)]).train(settings={"max_steps": 3})
    assert of(events, "plan")[0]["task"]["text"] == "Automatic: plain text"
    assert scores_of(events) == {}
    assert "## Answers" not in (Path(of(events, "done")[0]["path"]) / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [{"validation_fraction": 0.0}, {"train_on": "all"}],
    ids=["nothing held out", "prompts trained on"],
)
def test_without_held_out_answers_there_are_no_scores(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder(tmp_path, [row("classification", i) for i in range(48)])
    assert scores_of(folder.train(settings=settings | {"max_steps": 2})) == {}


def test_json_answers_are_scored_as_json(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} moon?", "completion": json.dumps({"moon": [i, "cat"]})} for i in range(48)]
    scores = scores_of(Folder(tmp_path, rows).train(settings={"max_steps": 2}))
    assert list(scores["tuned"]) == ["exact_match", "token_f1", "valid_json"]


def test_a_resumed_run_scores_the_same_base_and_model(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [row("classification", i) for i in range(48)])
    few = {"max_steps": 12}
    whole = folder.train("whole", settings=few)
    cut = folder.train("cut", settings=few, stop_when=lambda events: len(of(events, "metric")) >= 6)
    assert cut[-1] == {"t": "stopped"}
    last = of(cut, "checkpoint")[-1]["path"]
    resumed = folder.train("cut", settings=few, resume_from=last, epoch=2)
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 6}
    assert scores_of(resumed) == scores_of(whole) != {}


def test_a_stop_while_the_model_is_scored_is_made_good_after_resuming(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [row("classification", i) for i in range(48)])
    few = {"max_steps": 3, "eval_every": 0}

    def at_the_end(events: list[Event]) -> bool:
        phases = of(events, "phase")
        return any(c.get("final") for c in of(events, "checkpoint")) and phases[-1]["phase"] == "evaluating"

    cut = folder.train("cut", settings=few, stop_when=at_the_end)
    assert cut[-1] == {"t": "stopped"}
    resumed = folder.train("cut", settings=few, resume_from=of(cut, "checkpoint")[-1]["path"], epoch=2)
    assert "tuned" in scores_of(resumed)


def test_a_chosen_task_that_contradicts_the_rows_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [row("classification", i) for i in range(48)])
    with pytest.raises(Failure, match="No answer in the rows calls a tool") as failed:
        folder.train(settings={"task": "tools"})
    assert failed.value.reason == "bad_settings"


def test_scoring_changes_neither_random_numbers_nor_weights(tmp_path: Path) -> None:
    from training.engine import setup
    from training.engine.scores import Scorer

    folder = Folder(tmp_path, [row("classification", i) for i in range(48)])
    run = Run.parse(
        {
            "base": str(folder.base),
            "train_file": str(tmp_path / "rows.jsonl"),
            "work_dir": str(tmp_path / "work"),
            "settings": SETTINGS,
        }
    )
    session = setup.prepare(run, None, None, lambda t, **values: None, lambda: False)
    before, weights = torch.get_rng_state(), session.optimizer.weight_tensors()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    first, second = Scorer(session).score(), Scorer(session).score()
    assert first == second != {}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in session.optimizer.weight_tensors().items()
    )
