"""What can be wrong with rows: each kind of finding, why it matters, and how it is detected."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.row_schemas import Row

LINES_KEPT = 100
ROWS_COMPARED = 4_000_000  # 16 bytes each


@dataclass(frozen=True)
class Kind:
    """`why` and `fix` are sentences for users. `drop`: dropping the rows is a reasonable fix."""

    severity: str  # error | warning | info
    title: str
    why: str
    fix: str
    drop: bool = False


WRITTEN_EMPTY = {"nan", "none", "null", "<na>", "n/a", "nat", "undefined"}

KINDS: dict[str, Kind] = {
    "bad_row": Kind(
        "error",
        "Rows that cannot be read",
        "Training would either stop at these rows or skip them silently.",
        "Fix these lines, or drop them.",
        True,
    ),
    "chat_template": Kind(
        "error",
        "This base model's chat template cannot be used",
        "It fails on every conversation, so the fault is not in the rows.",
        "Choose another base model, or correct its chat template.",
    ),
    "several_examples": Kind(
        "info",
        "Conversations that become several examples",
        "The base model's chat template writes earlier answers differently as the conversation goes on (many leave their reasoning out). Each answer becomes an example of its own, with the conversation as the model sees it when it answers.",
        "No change is needed.",
    ),
    "left_out": Kind(
        "warning",
        "Rows that this base model's chat template cannot express",
        "Training on a part of such a row would teach the model something else, so these rows are left out. The other rows are used.",
        "Choose a base model whose chat template can express them, change them, or drop them.",
        True,
    ),
    "unused_field": Kind(
        "warning",
        "Fields that are not used",
        "They are not empty, but the model is not trained on them.",
        "If one of them matters, choose it as a column. Otherwise no change is needed.",
    ),
    "written_empty": Kind(
        "warning",
        "Cells that say nan, None or null",
        "Programs write these words for an empty cell. The model would learn them as text.",
        "Fill the cells in, leave them empty, or drop the rows.",
        True,
    ),
    "nothing_to_train": Kind(
        "warning",
        "Rows with nothing to learn",
        "They have no answer tokens to train on, so they take time but the model learns nothing from them.",
        "Add an answer, or drop them.",
        True,
    ),
    "answer_cut": Kind(
        "warning",
        "Rows whose answer is cut off",
        "The prompt alone fills the sequence length, so there is no room for the answer and nothing to learn.",
        "Choose a base model with a longer context, shorten the prompts, or drop them.",
        True,
    ),
    "truncated": Kind(
        "warning",
        "Rows longer than the sequence length",
        "Their end is cut off, so the model would learn to give unfinished answers.",
        "Raise the sequence length, shorten the rows, or drop them.",
        True,
    ),
    "missing_end": Kind(
        "warning",
        "Answers that do not end with an end token",
        "The model's chat template ends them with something else, so the model would not learn when to stop.",
        "Use another base model, or a chat template that ends each answer.",
    ),
    "special_tokens": Kind(
        "warning",
        "Control tokens spelled out in the text",
        "They are treated as plain text, so they do not mark turns, even if that was intended.",
        "Use chat messages for turns, and remove the tokens from the text.",
        True,
    ),
    "empty_answer": Kind(
        "warning",
        "Empty answers",
        "The model would learn to say nothing.",
        "Fill them in, or drop the rows.",
        True,
    ),
    "empty_prompt": Kind(
        "info",
        "Empty prompts",
        "The model would learn these answers without a question.",
        "Keep them if that is intended. Otherwise fill them in.",
    ),
    "no_answer_last": Kind(
        "warning",
        "Conversations that do not end with an answer",
        "Everything after the last assistant message is left out.",
        "Add the answer, or end the conversation earlier.",
    ),
    "duplicate": Kind(
        "warning",
        "Duplicate rows",
        "They count twice, and make held-out results look better than they are.",
        "Keep one copy of each.",
        True,
    ),
    "near_duplicate": Kind(
        "warning",
        "Rows that differ only in capitalization, spacing or punctuation",
        "They count twice, and make held-out results look better than they are.",
        "Keep one copy of each.",
        True,
    ),
    "conflict": Kind(
        "warning",
        "The same prompt with different answers",
        "The model learns a mixture of them.",
        "Choose one answer, unless the variety is intended.",
    ),
    "leak": Kind(
        "error",
        "Validation rows that are also in the training data",
        "The held-out loss would measure memorization, not learning.",
        "Remove them from the validation file.",
        True,
    ),
    "same_answer": Kind(
        "warning",
        "Every answer is the same",
        "The model would learn to give it to any prompt.",
        "Check that the right column is used as the answer.",
    ),
    "few": Kind(
        "warning",
        "Very few examples",
        "From fewer than ten examples, a model learns little more than the examples themselves.",
        "Add examples. Fifty good ones are a reasonable start.",
    ),
    "damage": Kind(
        "warning",
        "Damaged characters",
        "Text was decoded with the wrong encoding somewhere (�, Ã©, â€™, control characters). The model would learn to write these characters.",
        "Fix the encoding at the source of the data.",
        True,
    ),
    "invisible": Kind(
        "info",
        "Invisible characters",
        "Zero-width characters or direction marks make the tokens differ from what a reader sees.",
        "Remove them unless the writing system needs them.",
    ),
    "secret": Kind(
        "warning",
        "Possible secrets",
        "A model may repeat a key or password from its training data to anyone.",
        "Revoke it, and remove it from the data.",
        True,
    ),
    "personal": Kind(
        "warning",
        "Possible personal data",
        "A model may repeat addresses and numbers from its training data.",
        "Replace them with made-up ones unless they are public.",
        True,
    ),
    "run_together": Kind(
        "warning",
        "Prompts and answers with nothing between them",
        "The model reads the last word of the prompt and the first word of the answer as a single word.",
        "End prompts with punctuation or a line break, or begin answers with a space.",
    ),
    "trailing_space": Kind(
        "info",
        "Prompts that end with a space",
        "Most tokenizers attach a space to the next word, so these prompts end with an unusual token.",
        "Move the space to the start of the answer.",
    ),
    "poor_fit": Kind(
        "warning",
        "The tokenizer does not fit this text",
        "It needs more than one token for every two characters, so training is slow, and the model knows little about this language.",
        "Choose a base model for the language of your data.",
    ),
}


@dataclass
class Findings:
    """Counts and first lines of each kind of finding."""

    keep: int = LINES_KEPT
    lines: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, code: str, line: int, detail: str = "") -> None:
        self.counts[code] = self.counts.get(code, 0) + 1
        kept = self.lines.setdefault(code, [])
        if len(kept) < self.keep:
            kept.append(line)
            if detail:
                self.details.setdefault(code, []).append((line, detail))

    def join(self, later: Findings, lines: int) -> None:
        """Adds the findings of the part of the file that starts after `lines` lines."""
        for code, count in later.counts.items():
            self.counts[code] = self.counts.get(code, 0) + count
            kept = self.lines.setdefault(code, [])
            room = self.keep - len(kept)
            kept += [line + lines for line in later.lines[code][:room]]
            kept_details = [(line + lines, message) for line, message in later.details.get(code, [])]
            if kept_details:
                self.details.setdefault(code, []).extend(kept_details[:room])

    def as_list(self) -> list[dict[str, Any]]:
        """For the report: the most severe first, then the most frequent."""
        rank = {"error": 0, "warning": 1, "info": 2}
        codes = sorted(self.counts, key=lambda code: (rank[KINDS[code].severity], -self.counts[code]))
        return [
            {
                "code": code,
                "severity": KINDS[code].severity,
                "title": KINDS[code].title,
                "count": self.counts[code],
                "lines": sorted(filter(None, self.lines[code])),  # 0 = the whole file
                "details": [
                    f"line {n}: {message}" if n else message for n, message in self.details.get(code, [])[:20]
                ],
                "why": KINDS[code].why,
                "fix": KINDS[code].fix,
                "drop": KINDS[code].drop,
            }
            for code in codes
        ]


# --- one row --------------------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
CONTROLS = bytes([*range(9), 11, *range(14, 32), 127])
DAMAGE = re.compile("\ufffd|[\x80-\x9f]|Ã[\x80-\xbf©¨«®¡³±§¼¶¤¢]|â€[\x99\x9c\x9d™œ“”˜¦]|Â[\xa0«»°·©®£]|ï»¿")
INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
SECRETS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("an AWS key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    (
        "an API key",
        re.compile(
            r"\b(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35})"
        ),
    ),
    ("a private key", re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")),
    ("a signed token", re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")),
    (
        "a password",
        re.compile(
            r"(?i)\b(?:password|passwd|api[_-]?key|secret[_-]?key)\s*[:=]\s*[\"']?(?=[^\s\"']*[0-9])[^\s\"',;]{8,}"
        ),
    ),
)
# Each secret contains one of these words, and each word the character before it: plain searches cost next to
# nothing.
SECRET_WORDS = (
    ("", ("AKIA", "ASIA", "AIza", "eyJ", "xox", "PRIVATE KEY")),
    ("-", ("sk-",)),
    ("_", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_")),
)
SECRET_NAMES = (("", ("passw", "apikey", "secret")), ("-", ("api-key",)), ("_", ("api_key",)))
EMAIL = re.compile(
    r"[A-Za-z0-9._%+-]{1,64}@(?!example\.)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b"
)
DIGITS = re.compile(r"[0-9][0-9 ()./-]{6,}[0-9]")
# DIGITS needs eight such characters in a row; a translation table and a plain search rule that out faster.
NUMERIC, EIGHT = bytes(48 if chr(byte) in "0123456789 ()./-" else 0 for byte in range(256)), b"0" * 8
SSN = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?!\w)"
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
CARD = re.compile(r"(?<![\d.])(?:\d[ -]?){13,19}(?![\d.])")


@dataclass(frozen=True)
class Prefilter:
    """What a batch of texts may contain. Checking all of them at once is cheap, and what none contains
    need not be searched for in each."""

    non_ascii: bool
    control: bool
    special: bool
    secret: bool
    address: bool
    digits: bool

    @classmethod
    def of(cls, texts: Iterable[str], special: re.Pattern[str] | None) -> Prefilter:
        text = "\n".join(texts)
        raw = text.encode("utf-8", "replace")
        return cls(
            non_ascii=len(raw) != len(text),
            control=len(raw.translate(None, CONTROLS)) != len(raw),
            special=special is not None and special.search(text) is not None,
            secret=_may_have_secret(text),
            address="@" in text,
            digits=EIGHT in raw.translate(NUMERIC),
        )


def check_row(
    row: Row,
    text: str,
    findings: Findings,
    special: re.Pattern[str] | None,
    prefilter: Prefilter | None = None,
) -> None:
    """Adds all findings of a single row. `text` is its preview, `prefilter` covers it and its neighbors."""
    line = row.line
    prefilter = prefilter or Prefilter.of([text], special)
    plain = not prefilter.non_ascii or text.isascii()
    if (prefilter.control and CONTROL.search(text)) or (not plain and DAMAGE.search(text)):
        findings.add("damage", line)
    if not plain and INVISIBLE.search(text):
        findings.add("invisible", line)
    if prefilter.special and special is not None and special.search(text):
        findings.add("special_tokens", line)
    if prefilter.secret and (kind := find_secret(text)):
        findings.add("secret", line, kind)
    if (prefilter.address or prefilter.digits) and (kind := find_personal_data(text)):
        findings.add("personal", line, kind)
    if row.kind == "completion":
        _check_pair(row, findings)
        _check_written_empty(line, (row.prompt, row.completion), findings)
    elif row.kind == "text":
        _check_written_empty(line, (row.text,), findings)
    elif row.kind == "chat":
        _check_written_empty(line, (m["content"] for m in row.messages), findings)
        answers = [m for m in row.messages if m["role"] == "assistant" and m.get("weight", 1)]
        if any(not m["content"].strip() and not m.get("tool_calls") for m in answers):
            findings.add("empty_answer", line)
        if answers and row.messages[-1]["role"] != "assistant":
            findings.add("no_answer_last", line)


def _check_written_empty(line: int, texts: Iterable[str], findings: Findings) -> None:
    for text in texts:
        if len(text) >= 12 and "\n\n" not in text[-13:]:  # most texts: their last paragraph is longer
            continue
        word = text.rpartition("\n\n")[2]  # an instruction's input comes last
        if len(word) < 12 and word.strip().lower() in WRITTEN_EMPTY:
            findings.add("written_empty", line, word.strip())
            return


def _check_pair(row: Row, findings: Findings) -> None:
    if not row.completion.strip():
        findings.add("empty_answer", row.line)
    elif not row.prompt.strip():
        findings.add("empty_prompt", row.line)
    elif row.prompt[-1].isalnum() and row.completion[0].isalnum():
        findings.add("run_together", row.line)
    elif row.prompt.endswith(" "):
        findings.add("trailing_space", row.line)


def find_secret(text: str) -> str:
    """The kind of secret in a text, or an empty string. Never the secret itself."""
    if not _may_have_secret(text):
        return ""
    return next((name for name, pattern in SECRETS if pattern.search(text)), "")


def _may_have_secret(text: str) -> bool:
    return _holds(text, SECRET_WORDS) or _holds(text.lower(), SECRET_NAMES)


def _holds(text: str, words: Iterable[tuple[str, Iterable[str]]]) -> bool:
    return any(sign in text and any(word in text for word in some) for sign, some in words)


def find_personal_data(text: str) -> str:
    """The kind of personal data in a text, or an empty string. Never the data itself."""
    if "@" in text and EMAIL.search(text):
        return "an email address"
    if EIGHT not in text.encode("utf-8", "replace").translate(NUMERIC) or not DIGITS.search(text):
        return ""
    if SSN.search(text):
        return "a social security number"
    if any(_is_card(match[0]) for match in CARD.finditer(text)):
        return "a card number"
    if any(_is_iban(match[0]) for match in IBAN.finditer(text)):
        return "a bank account number"
    return "a phone number" if PHONE.search(text) else ""


def _is_card(text: str) -> bool:
    """Checks Luhn's check digit and the first digit of a card number."""
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or digits[0] not in (3, 4, 5, 6) or len(set(digits)) < 2:
        return False
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    code = text.replace(" ", "")
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


# --- comparing rows -------------------------------------------------------------------------------


# Lowercase letters and digits stay, uppercase becomes lowercase, everything else a space.
PLAIN = bytes(ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else 32 for byte in range(256))
SEEN = (1 << 64) - 1


def normal(text: str) -> str:
    """The text without differences in case, spacing and punctuation."""
    if text.isascii():  # ten times faster
        plain = text.encode().translate(PLAIN)
        while b"  " in plain:  # twice as fast as split and join
            plain = plain.replace(b"  ", b" ")
        return plain.strip().decode()
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def fingerprint(text: str) -> int:
    """Eight bytes of a hash that differs in each process, so that collisions cannot be constructed."""
    return hash(text) & SEEN


class DuplicateIndex:
    """Keeps eight bytes of each text, to find duplicates at the end."""

    def __init__(self) -> None:
        self.keys, self.lines = array("Q"), array("Q")

    def add(self, text: str, line: int) -> None:
        if len(self.keys) < ROWS_COMPARED:
            self.keys.append(fingerprint(text))
            self.lines.append(line)

    def join(self, later: DuplicateIndex, lines: int) -> None:
        """Adds the texts of the part of the file that starts after `lines` lines."""
        room = ROWS_COMPARED - len(self.keys)
        self.keys.extend(later.keys[:room])
        self.lines.extend(
            array("Q", (np.frombuffer(later.lines, np.uint64)[:room] + np.uint64(lines)).tobytes())
        )

    def repeats(self) -> Iterator[tuple[int, int]]:
        """(line, line of the first occurrence) of every repeated text, in file order."""
        keys, lines = np.frombuffer(self.keys, np.uint64), np.frombuffer(self.lines, np.uint64)
        if len(keys) == 0:
            return
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        if len(same) == 0:
            return
        starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
        first = order[starts[np.searchsorted(starts, same, "right") - 1]]
        pairs = sorted(zip(order[same].tolist(), first.tolist(), strict=True))
        for later, earlier in pairs:
            yield int(lines[later]), int(lines[earlier])

    def common(self, other: DuplicateIndex) -> list[int]:
        """Lines of `other` whose text is also in this index."""
        if not len(self.keys) or not len(other.keys):
            return []
        here = np.isin(np.frombuffer(other.keys, np.uint64), np.frombuffer(self.keys, np.uint64))
        return [int(line) for line in np.frombuffer(other.lines, np.uint64)[here]]
