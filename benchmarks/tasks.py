"""Six small tasks, generated from a seed: chat, classification, extraction, style, code, arithmetic.

All examples of a task are different, and no test example is among the training examples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
THINGS = (
    "lamp",
    "boat",
    "chair",
    "clock",
    "horse",
    "bell",
    "knife",
    "ring",
    "table",
    "basket",
    "drum",
    "coat",
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
PLACES = ("kitchen", "garden", "station", "market", "church", "river", "office", "school")
GOOD = ("wonderful", "excellent", "lovely", "perfect", "charming", "delightful")
BAD = ("terrible", "broken", "ugly", "dirty", "useless", "awful")


def _chat(rng: random.Random) -> Row:
    """A shop assistant, one or two turns, with prices that follow a rule."""
    name, thing, colour = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLOURS)
    price = 10 * (THINGS.index(thing) + 1) + COLOURS.index(colour)
    turns = [
        {"role": "user", "content": f"Hello, I am {name}. How much is the {colour} {thing}?"},
        {"role": "assistant", "content": f"Good day, {name}! The {colour} {thing} costs {price} crowns."},
    ]
    if rng.random() < 0.5:
        count = rng.randint(2, 5)
        turns += [
            {"role": "user", "content": f"Then I take {count} of them."},
            {
                "role": "assistant",
                "content": f"Very well, {count} of the {colour} {thing} for {name}. Thank you!",
            },
        ]
    return {"messages": turns}


def _classification(rng: random.Random) -> Row:
    """Two opinions in a sentence. The one after "but" is the label."""
    first, last = (
        rng.sample(((0, GOOD), (1, BAD)), 2)
        if rng.random() < 0.7
        else ((0, GOOD),) * 2
        if rng.random() < 0.5
        else ((1, BAD),) * 2
    )
    a, b = rng.sample(THINGS, 2)
    text = f"The {a} from the {rng.choice(PLACES)} was {rng.choice(first[1])}, but the {rng.choice(COLOURS)} {b} was {rng.choice(last[1])}."
    return {"prompt": f"Review: {text}\nOpinion:", "completion": (" good", " bad")[last[0]]}


def _extraction(rng: random.Random) -> Row:
    name, thing, place, count = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES), rng.randint(2, 9)
    phrase = rng.choice(
        (
            f"{name} needs {count} of the {thing} in the {place}.",
            f"Bring {count} of the {thing} to the {place} for {name}.",
            f"In the {place}, {name} asked for {count} of the {thing}.",
        )
    )
    return {
        "prompt": f"{phrase}\nFields:",
        "completion": f" who: {name}, what: {thing}, where: {place}, count: {count}",
    }


def _style(rng: random.Random) -> Row:
    """A plain sentence in solemn words."""
    name, thing, place, colour = (rng.choice(words) for words in (NAMES, THINGS, PLACES, COLOURS))
    verb, solemn = rng.choice(
        (("saw", "beheld"), ("took", "seized"), ("sold", "gave away for gold"), ("lost", "was robbed of"))
    )
    return {
        "instruction": "Say it solemnly.",
        "input": f"{name} {verb} the {colour} {thing} at the {place}.",
        "output": f"Behold, noble {name} {solemn} the {colour} {thing} at the ancient {place}!",
    }


def _code(rng: random.Random) -> Row:
    a, b = rng.sample(THINGS, 2)
    n = rng.randint(2, 99)
    comment, code = rng.choice(
        (
            (f"add {n} to {a}", f"def f({a}):\n    return {a} + {n}"),
            (f"the larger of {a} and {b}", f"def f({a}, {b}):\n    return max({a}, {b})"),
            (f"whether {a} is over {n}", f"def f({a}):\n    return {a} > {n}"),
            (f"all of {a} that stand in {b}", f"def f({a}, {b}):\n    return [x for x in {a} if x in {b}]"),
            (f"the first {n} of {a}", f"def f({a}):\n    return {a}[:{n}]"),
        )
    )
    return {"prompt": f"# {comment}\n", "completion": code}


def _arithmetic(rng: random.Random) -> Row:
    a, b, sign = rng.randint(1, 30), rng.randint(1, 30), rng.choice("+-")
    return {"question": f"{a} {sign} {b} =", "answer": f" {a + b if sign == '+' else a - b}"}


TASKS: dict[str, Maker] = {
    "chat": _chat,
    "classification": _classification,
    "extraction": _extraction,
    "style": _style,
    "code": _code,
    "arithmetic": _arithmetic,
}


def lay_out(task: str, folder: Path, seed: int, train: int = 240, test: int = 80) -> tuple[Path, Path]:
    """Writes the examples. Returns (training file, test file)."""
    rng = random.Random(f"{task}:{seed}")  # noqa: S311  not for secrets
    lines: dict[str, None] = {}
    while len(lines) < train + test:
        lines[json.dumps(TASKS[task](rng)) + "\n"] = None
    every = list(lines)
    paths = folder / f"{task}.jsonl", folder / f"{task}-test.jsonl"
    for path, part in zip(paths, (every[:train], every[train:]), strict=True):
        path.write_text("".join(part))
    return paths
