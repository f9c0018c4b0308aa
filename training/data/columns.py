"""Suggestions for the columns of a file whose names say nothing known: by what the names mean and how long
the texts are, never by the order of the columns alone. The user decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from training.data import row_schemas
from training.data.bad_row import is_empty

# Words in names, in the languages that files come in most often.
ANSWER_WORDS = {
    "answer",
    "response",
    "reply",
    "output",
    "completion",
    "target",
    "label",
    "labels",
    "sentiment",
    "category",
    "class",
    "intent",
    "topic",
    "summary",
    "translation",
    "solution",
    "result",
    "rating",
    "score",
    "antwort",
    "respuesta",
    "réponse",
    "reponse",
    "risposta",
    "resposta",
    "kategorie",
    "etikett",
    "chosen",
    "generation",
    "expected",
}
PROMPT_WORDS = {
    "prompt",
    "question",
    "query",
    "input",
    "instruction",
    "user",
    "request",
    "review",
    "sentence",
    "text",
    "title",
    "article",
    "message",
    "email",
    "ticket",
    "comment",
    "source",
    "problem",
    "frage",
    "pregunta",
    "domanda",
    "pergunta",
    "eingabe",
}
OTHER_WORDS = {
    "id",
    "ids",
    "idx",
    "index",
    "uuid",
    "guid",
    "key",
    "no",
    "nr",
    "number",
    "row",
    "line",
    "date",
    "time",
    "timestamp",
    "created",
    "updated",
    "url",
    "link",
    "href",
    "path",
    "file",
    "filename",
    "split",
    "lang",
    "language",
    "hash",
    "md5",
    "sha",
    "author",
    "user_id",
    "model",
    "license",
    "unnamed",
}
NUMBER = re.compile(r"[+-]?[\d.,:/%€$ -]*\d[\d.,:/%€$ TZ-]*")
LONG_NAME, WORDS_IN_NAME = 60, 6
SHORT_SHARE = 0.25  # an answer this much shorter than the prompt looks like a label


def guess(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """(shape, columns) to suggest. `rows` are the first ones."""
    if recognized := row_schemas.recognize(dict.fromkeys(names, ""), forgiving=True):
        return recognized
    nested = {name: kind for name in names if (kind := _nested(rows, name))}
    if nested:
        name, (shape, need) = next(iter(nested.items()))
        return shape, {need: name}
    lengths = {name: length for name in names if (length := _length(rows, name))}
    texts = {name: length for name, length in lengths.items() if not _words(name) & OTHER_WORDS} or lengths
    if not texts:
        texts = dict.fromkeys(names, 1.0)
    longest = sorted(texts, key=lambda name: -texts[name])
    answers = [name for name in longest if _words(name) & ANSWER_WORDS]
    prompts = [name for name in longest if _words(name) & PROMPT_WORDS and name not in answers]
    others = [name for name in longest if name not in answers]
    if answers and (prompts or others):
        return "completion", {"prompt": (prompts or others)[0], "completion": answers[0]}
    if len(longest) == 1:
        return "text", {"text": longest[0]}
    if prompts and len(longest) > 1:
        return "completion", {
            "prompt": prompts[0],
            "completion": next(name for name in longest if name != prompts[0]),
        }
    # Two texts without a hint: a short one is a label of the other, else the question is usually first.
    first, second = sorted(longest[:2], key=list(names).index)
    if texts[first] < SHORT_SHARE * texts[second]:
        first, second = second, first
    return "completion", {"prompt": first, "completion": second}


def first_row_is_data(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first row of a table looks like data, not like the names of its columns."""
    if row_schemas.recognize(dict.fromkeys(names, ""), forgiving=True):
        return False
    if any(
        len(name) > LONG_NAME
        or len(name.split()) >= WORDS_IN_NAME
        or name.endswith((".", "!", "?"))
        or NUMBER.fullmatch(name)
        for name in names
    ):
        return True
    # a label that is also in a row below
    return any(name in {str(row.get(name, "")).strip() for row in rows} for name in names)


def _words(name: str) -> set[str]:
    """customerReview_2 → {customer, review, customerreview_2}"""
    split = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return {word for word in re.split(r"[\W\d_]+", split.lower()) if word} | {name.strip().lower()}


def _length(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Average length of the texts in a column; 0 if it has none, or only numbers and dates."""
    texts = [value.strip() for row in rows if isinstance(value := row.get(name), str) and value.strip()]
    if not texts or all(NUMBER.fullmatch(text) for text in texts):
        return 0
    return sum(map(len, texts)) / len(texts)


def _nested(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str] | None:
    """The shape of a column that holds conversations or segments."""
    value = next((row[name] for row in rows if not is_empty(row.get(name))), None)
    part = value[0] if isinstance(value, list) and value else None
    if not isinstance(part, dict):
        return None
    if "role" in part or ("from" in part and "content" in part):
        return "chat", "messages"
    if "from" in part:
        return "sharegpt", "conversations"
    return ("segments", "segments") if {"label", "text"} <= part.keys() else None
