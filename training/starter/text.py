"""Dictionary English made from WordNet: each meaning becomes a few sentences, next to related meanings."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILES = ("noun", "verb", "adj", "adv")
ANIMALS, PLANTS = 5, 20  # WordNet's numbers of these topics: mostly Latin names, of which a tenth is enough
DOCUMENT_CHARS = 2200  # about 512 tokens


@dataclass(frozen=True)
class Meaning:
    """A synset of WordNet."""

    pos: str
    topic: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    kind_of: str  # its hypernym, or ""
    instance: bool  # a particular thing: London, not a city


def documents(folder: Path, seed: int) -> list[str]:
    """The whole text, shuffled by document."""
    rng = random.Random(seed)  # noqa: S311 - sentences, not secrets
    texts: list[str] = []
    for pos in FILES:
        held, size = [], 0
        for meaning in meanings(folder / f"data.{pos}"):
            if meaning.topic in (ANIMALS, PLANTS) and pos == "noun" and rng.random() > 0.1:
                continue
            paragraph = " ".join(sentences(meaning, rng))
            held.append(paragraph)
            size += len(paragraph)
            if size > DOCUMENT_CHARS:
                texts.append("\n\n".join(held))
                held, size = [], 0
        texts += ["\n\n".join(held)] if held else []
    rng.shuffle(texts)
    return texts


def meanings(path: Path) -> Iterator[Meaning]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
    first_word = {line.split(" ", 1)[0]: _word(line.split(" ")[4]) for line in lines}
    for line in lines:
        head, gloss = line.split(" | ", 1)
        fields = head.split(" ")
        count = int(fields[3], 16)
        words = tuple(_word(word) for word in fields[4 : 4 + 2 * count : 2])
        above = re.search(r"(@i?) (\d{8}) n", head)
        quoted = re.findall(r'"([^"]+)"', gloss)
        definition = re.sub(r'[;:,]?\s*"[^"]*"?.*$', "", gloss).strip().rstrip(";")
        if definition:
            yield Meaning(
                pos=path.suffix[1:],
                topic=int(fields[1]),
                words=words,
                definition=re.sub(r"\s+", " ", definition),
                examples=tuple(_sentence(example) for example in quoted if len(example.split()) > 2),
                kind_of=first_word.get(above[2], "") if above else "",
                instance=bool(above and above[1] == "@i"),
            )


def sentences(m: Meaning, rng: random.Random) -> Iterator[str]:
    word, definition = m.words[0], m.definition
    article = definition.startswith(("a ", "an ", "one ", "any ", "someone ", "something "))
    if m.pos == "noun" and article and not m.instance:
        subject = _a(word) if word[0].islower() else word
        if rng.random() < 0.2:
            yield f"What is {subject}?"
        yield _sentence(f"{subject} is {definition}")
    elif m.pos == "noun":
        yield _sentence(
            f"{word} {'was' if re.search(r'[0-9]{4}-[0-9]{4}', definition) else 'is'} {definition}"
        )
    elif m.pos == "verb":
        yield _sentence(rng.choice((f"to {word} is to {definition}", f"to {word} means to {definition}")))
    elif m.pos == "adj":
        yield _sentence(rng.choice((f"{word} means {definition}", f"something {word} is {definition}")))
    else:
        yield _sentence(f"{word} means {definition}")
    if m.kind_of and rng.random() < 0.4:
        yield _sentence(
            f"{'it' if m.instance else _a(word)} is {'' if m.instance else 'a kind of '}{m.kind_of if not m.instance else _a(m.kind_of)}"
        )
    if len(m.words) > 1 and rng.random() < 0.6:
        yield f"Another word for {word} is {' or '.join(m.words[1:3])}."
    if m.examples:
        yield rng.choice(("", "For example: ", "One can say: ")) + " ".join(m.examples)


def _word(field: str) -> str:
    return re.sub(r"\((a|p|ip)\)$", "", field).replace("_", " ")


def _a(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _sentence(text: str) -> str:
    text = text.strip().rstrip(",;")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
