"""Makes the sample task: an order, written as a person would, becomes one line of fields.

    python -m training.starter.make_sample

Every held-out order combines known words in a way no training row does, so remembering rows does not solve it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "sample"
SEED, TRAIN, HELD_OUT = 7, 480, 60

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
ITEMS = {
    "lamp": "lamps",
    "chair": "chairs",
    "cup": "cups",
    "shirt": "shirts",
    "table": "tables",
    "book": "books",
}
CITIES = ("Paris", "London", "Rome", "Boston", "Berlin", "Madrid")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

SENTENCES = (
    "Please send {count} {colour} {item} to {city} by {day}.",
    "We need {count} {colour} {item} in {city} before {day}.",
    "Could you ship {count} {item} in {colour} to our {city} office? They must arrive on {day}.",
    "By {day}, please deliver {count} {colour} {item} to {city}.",
    "An order for {city}: {count} {item}, all {colour}, for {day}.",
    "Hello, I would like {count} {colour} {item}. Deliver to {city} on {day}, please.",
    "On {day} our shop in {city} opens and wants {count} {item} in {colour}.",
    "For {day}: {count} {colour} {item}, to be brought to {city}.",
)


def main() -> None:
    rng = random.Random(SEED)  # noqa: S311 - examples, not secrets
    seen: set[tuple[str, ...]] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < TRAIN + HELD_OUT:
        fields = tuple(rng.choice(list(choice)) for choice in (COUNTS, COLOURS, ITEMS, CITIES, DAYS))
        if fields not in seen:
            seen.add(fields)
            rows.append(example(fields, rng.choice(SENTENCES)))
    FOLDER.mkdir(exist_ok=True)
    write(FOLDER / "train.jsonl", rows[:TRAIN])
    write(FOLDER / "heldout.jsonl", rows[TRAIN:])


def example(fields: tuple[str, ...], sentence: str) -> dict[str, str]:
    count, colour, item, city, day = fields
    name = item if count == "one" else ITEMS[item]
    return {
        "prompt": f"Order: {sentence.format(count=count, colour=colour, item=name, city=city, day=day)}\nFields:",
        "completion": f" item: {item} | colour: {colour} | count: {COUNTS[count]} | city: {city} | day: {day}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
