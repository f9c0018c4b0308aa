"""The task of a dataset: what its rows teach a model to do. It decides how held-out answers are scored
(plan/metrics.py) and how long answers are by default. How rows become tokens is decided by the rows alone.

Imports no torch: pages guess and check with it, and so does the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.data.row_schemas import Row


@dataclass(frozen=True)
class Task:
    label: str  # on a page
    sample_tokens: int = 32  # of a sample answer during training
    max_tokens: int = 128  # of an answer in the playground


TASKS: dict[str, Task] = {
    "chat": Task("chat"),
    "instruction": Task("instruction"),
    # A label is short, so what a model writes beyond that is of no use.
    "classification": Task("classification", max_tokens=32),
    "text": Task("plain text"),
    # A call can be read only as a whole, and its arguments make it longer than a sentence.
    "tools": Task("tools", sample_tokens=128, max_tokens=256),
}

LABEL_CHARACTERS = 50  # a longer answer is no label
MAX_LABELS = 50  # with more, the task is not guessed to be classification
ROWS_PER_LABEL = 5  # with fewer, neither
COUNTED = 1000  # labels; beyond this they are only known to be more


@dataclass
class TaskCounts:
    """What the rows of a file say about its task. Rows without a trained answer count only as rows."""

    rows: int = 0
    text: int = 0  # rows of plain text
    chat: int = 0  # rows of messages, to which a chat template is applied
    several: int = 0  # rows with more than one answer
    calls: int = 0  # rows whose answers call tools
    labels: set[str] = field(default_factory=set)  # the different answers, at most COUNTED + 1
    longer: int = 0  # rows whose answer is too long for a label

    def add(self, row: Row) -> None:
        self.rows += 1
        if row.kind == "text":
            self.text += 1
            return
        answer = row.completion
        if row.kind == "segments":
            answer = next((text for text, trained in reversed(row.segments) if trained), "")
        elif row.kind == "chat":
            self.chat += 1
            answers = [m for m in row.messages if m["role"] == "assistant"]
            trained = [m for m in answers if m.get("weight", 1) != 0]
            self.several += len(answers) > 1
            self.calls += any("tool_calls" in m for m in trained)
            answer = trained[-1]["content"] if trained else ""
        answer = answer.strip()
        if len(answer) > LABEL_CHARACTERS:
            self.longer += 1
        elif answer and len(self.labels) <= COUNTED:
            self.labels.add(answer)

    def join(self, other: TaskCounts) -> None:
        for name in ("rows", "text", "chat", "several", "calls", "longer"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.labels |= other.labels

    def as_dict(self) -> dict[str, int]:
        """As stored in a report, which keeps only the number of labels."""
        names = ("rows", "text", "chat", "several", "calls", "longer")
        number = min(len(self.labels), COUNTED + 1)
        return {name: getattr(self, name) for name in names} | {"labels": number}


# ---- the counts of a report ----------------------------------------------------------------------

Counts = Mapping[str, int]  # as TaskCounts.as_dict; empty if the report was made before there were any


def guess(counts: Counts) -> str:
    """The task that the rows suggest; empty if nothing is known about them."""
    if not counts:
        return ""
    if counts["text"]:
        return "text"
    if counts["calls"]:
        return "tools"
    labels = 0 if counts["longer"] or counts["several"] else counts["labels"]
    if 2 <= labels <= MAX_LABELS and labels * ROWS_PER_LABEL <= counts["rows"]:
        return "classification"
    return "chat" if counts["several"] else "instruction"


def refusal(task: str | None, counts: Counts) -> str:
    """Why the rows cannot be used for a chosen task, and what to do; empty if they can."""
    if not task or not counts or not counts["rows"]:
        return ""
    rows, different = counts["rows"], counts["labels"] + counts["longer"]
    if counts["text"] and task != "text":
        return "The rows are plain text without prompts and answers. Choose plain text as the task, or another dataset."
    if task == "text" and not counts["text"]:
        return "The rows have prompts and answers, so they are not plain text. Choose another task, or upload plain text."
    if task == "tools" and not counts["calls"]:
        return "No answer in the rows calls a tool. Choose another task, or a dataset with tool calls."
    if task == "chat" and not counts["chat"]:
        return "The rows are prompts and completions, to which no chat template is applied. Choose instruction, or a dataset of conversations."
    if task == "classification" and (counts["labels"] > COUNTED or 2 * different > rows):
        many = f"more than {COUNTED:,}" if counts["labels"] > COUNTED else f"{different:,}"
        return (
            f"The {rows:,} rows have {many} different answers, which is too many for labels. "
            "Choose another task, or add rows until each label has at least two."
        )
    return ""


def describe(chosen: str | None, counts: Counts) -> dict[str, Any]:
    """The task for pages and the API: its name, whether it was guessed, and a few words. Empty if it is not
    known yet."""
    name = chosen or guess(counts)
    if not name:
        return {}
    text = TASKS[name].label
    if name == "classification" and counts:
        more = f"more than {COUNTED:,}" if counts["labels"] > COUNTED else f"{counts['labels']:,}"
        text += f", {more} {'label' if counts['labels'] == 1 else 'labels'}"
    text = text[0].upper() + text[1:] if chosen else f"Automatic: {text}"
    return {"name": name, "automatic": not chosen, "text": text}
