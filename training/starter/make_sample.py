"""Makes the sample task: an order in natural language becomes one line of fields.

    python -m training.starter.make_sample

Every held-out order combines known words in a way that no training row does, so memorizing rows does not
solve it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "sample"
SEED, TRAIN, HELD_OUT = 7, 480, 60

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
ITEMS = ("chair", "cup", "table", "book", "boat", "clock", "bell", "coat", "hat", "ring", "plate", "door")
COUNTRIES = ("France", "England", "China", "Japan", "India", "Russia", "Germany", "Egypt", "Mexico")

SENTENCES = (
    "Please send {count} {color} {item} to {country}.",
    "We need {count} {color} {item} in {country}.",
    "Could you ship {count} {item} in {color} to our office in {country}?",
    "Deliver to {country}: {count} {color} {item}.",
    "An order for {country}: {count} {item}, all {color}.",
    "Hello, I would like {count} {color} {item}. I live in {country}.",
    "Our shop in {country} wants {count} {item} in {color}.",
    "My friend in {country} asks for {count} {color} {item}, please.",
)


def main() -> None:
    rng = random.Random(SEED)  # noqa: S311 - examples, not secrets
    seen: set[tuple[str, ...]] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < TRAIN + HELD_OUT:
        fields = tuple(rng.choice(list(choice)) for choice in (COUNTS, COLORS, ITEMS, COUNTRIES))
        if fields not in seen:
            seen.add(fields)
            rows.append(example(fields, rng.choice(SENTENCES)))
    FOLDER.mkdir(exist_ok=True)
    write(FOLDER / "train.jsonl", rows[:TRAIN])
    write(FOLDER / "heldout.jsonl", rows[TRAIN:])


def example(fields: tuple[str, ...], sentence: str) -> dict[str, str]:
    count, color, item, country = fields
    request = sentence.format(
        count=count, color=color, item=item if count == "one" else f"{item}s", country=country
    )
    return {
        "prompt": f"Order: {request}\nFields:",
        "completion": f" item: {item}, color: {color}, count: {COUNTS[count]}, country: {country}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
