"""The report on a dataset: everything that users should know about it before training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from training.data.bad_row import BadBase, LeftOut
from training.data.formats import (
    DEFAULT_LIMITS,
    BadFile,
    BadRow,
    ByteRange,
    Format,
    Row,
    detect,
    detect_lenient,
    head,
    rows,
)
from training.data.readers import unused_columns
from training.data.row_schemas import preview_of, preview_of_message
from training.data.summary import Summary
from training.plan.tasks import TaskCounts
from training.report.findings import (
    LINES_KEPT,
    DuplicateIndex,
    Findings,
    Prefilter,
    check_row,
    fingerprint,
    normal,
)
from training.text.encode import (
    EncodingOptions,
    Example,
    Tokens,
    as_reported,
    batches,
    encode_batch,
    encoded_batches,
    numbered,
)
from training.text.tokenizer import Tokenizer

SAMPLES, SAMPLE_TOKENS = 5, 400
SPLIT_FROM_BYTES = 16 << 20  # larger files are read by two processes
JOINED = (
    "rows",
    "characters",
    "non_ascii",
    "summary",
    "findings",
    "exact",
    "near",
    "prompts",
    "answers",
    "unused",
    "several",
    "tasks",
)
ROW_TOKENS = 4000  # of a single row
FEW = 10
CHARACTERS_PER_TOKEN = 2.0  # below this, the tokenizer does not fit the language

Progress = Callable[[int, float], None]


def report(
    path: str | Path,
    tokenizer: Tokenizer | None,
    settings: EncodingOptions | None = None,
    *,
    format: Format | dict[str, Any] | None = None,
    validation: str | Path | None = None,
    validation_format: Format | dict[str, Any] | None = None,
    progress: Progress = lambda rows, share: None,
) -> dict[str, Any]:
    """Reads every row of a file. Never raises because of its content: the verdict says what is wrong.

    Without a tokenizer, no tokens are counted. `ready` says whether a job can train on it."""
    path = Path(path)
    run = _Report(tokenizer, settings or EncodingOptions())
    try:
        chosen = Format.of(format) if format else detect(path)
        halves = _halves(path, chosen)
        if halves:
            run.read_both(path, chosen, progress, *halves)
        else:
            run.read(path, chosen, progress)
        if validation is not None:
            run.compare(Path(validation), Format.of(validation_format) if validation_format else None)
    except BadRow as bad:
        run.bad(bad)
        chosen = Format.of(format) if format else Format("unknown")
    return {
        **run.finish(chosen),
        **_column_choice(path, chosen, bool(format), run.rows + run.findings.counts.get("left_out", 0)),
    }


def _column_choice(path: Path, chosen: Format, given: bool, read: int) -> dict[str, Any]:
    """The head of a file with columns, so that the user can choose among them. `choose`: they must, since
    no row could be read with the known or given columns."""
    try:
        written = detect_lenient(path)
        file_head = head(path, written) | {"format": written.as_dict()}
    except BadRow:
        return {}
    if not file_head["columns"] or not file_head["rows"]:
        return {}
    return {"head": file_head, "choose": not read and (given or not chosen.shape)}


def findings_of(
    path: str | Path, tokenizer: Tokenizer | None, settings: EncodingOptions, format: Format
) -> dict[str, list[int]]:
    """{code: numbers of the rows with that finding}, where the first row is 1. Row numbers rather than
    lines, because all elements of a JSON array may be on one line. Raises BadFile."""
    run = _Report(tokenizer, settings, keep=sys.maxsize)
    run.by_order = True
    run.read(Path(path), format, lambda rows, share: None)
    run.finish(format)
    return run.findings.lines


def _halves(path: Path, format: Format) -> tuple[ByteRange, ByteRange] | None:
    """The two halves of a large JSON Lines file, if there is a second core to read one of them."""
    size = path.stat().st_size
    if format.container != "jsonl" or format.encoding != "utf-8" or size < SPLIT_FROM_BYTES or _cores() < 2:
        return None
    with path.open("rb") as file:
        file.seek(size // 2)
        if not file.readline(SPLIT_FROM_BYTES // 4).endswith(b"\n"):
            return None
        middle = file.tell()
    return ByteRange(0, middle), ByteRange(middle, size)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _lines_in(path: Path, part: ByteRange) -> int:
    lines, left = 0, part.bytes
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            lines, left = lines + piece.count(b"\n"), left - len(piece)
    return lines


class _Report:
    """The report in progress."""

    def __init__(
        self, tokenizer: Tokenizer | None, settings: EncodingOptions, keep: int = LINES_KEPT
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.summary, self.findings = Summary(), Findings(keep)
        self.rows = self.characters = self.non_ascii = 0
        self.several = 0  # examples of rows that become several
        self.by_order = False  # number rows by their order among readable ones, not by line
        self.samples: list[dict[str, Any]] = []
        self.exact, self.near, self.prompts = DuplicateIndex(), DuplicateIndex(), DuplicateIndex()
        self.answers: set[int] = set()
        self.tasks = TaskCounts()
        self.unused: dict[str, int] = {}  # rows by the name of a field that they do not use
        self.problem: BadRow | None = None

    def bad(self, bad: BadRow) -> None:
        if isinstance(bad, LeftOut):
            self.findings.add("left_out", bad.line, bad.reason)
            return
        self.problem = self.problem or bad
        code = "chat_template" if isinstance(bad, BadBase) else "bad_row"
        self.findings.add(code, bad.line, f"{bad.reason}. {bad.fix}")

    def read(self, path: Path, format: Format, progress: Progress, part: ByteRange | None = None) -> None:
        size, reported = max(1, part.bytes if part else path.stat().st_size), time.monotonic()
        for batch in self._batches(path, format, part):
            texts = [row.preview for row, _ in batch]
            special = self.tokenizer.special_pattern if self.tokenizer else None
            prefilter = Prefilter.of(texts, special)
            for (row, examples), text in zip(batch, texts, strict=True):
                self.rows += 1
                self.characters += len(text)
                if prefilter.non_ascii:
                    self.non_ascii += len(text) - len(text.encode("ascii", "ignore"))
                check_row(row, text, self.findings, special, prefilter)
                self.row(row, text, examples)
            if time.monotonic() - reported > 0.5:
                reported = time.monotonic()
                progress(self.rows, min(0.99, self.characters / size))
        for name, count in unused_columns(path, format, DEFAULT_LIMITS).items():
            self.unused[name] = self.unused.get(name, 0) + count

    def read_both(
        self, path: Path, format: Format, progress: Progress, first: ByteRange, second: ByteRange
    ) -> None:
        """Reads two halves at once, the second in a child process, which ends with this one."""
        fork = get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        ahead, parent = fork.Value("q", 0, lock=False), os.getpid()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes keep both cores busy

        def watch(rows: int, share: float) -> None:
            ahead.value = rows
            if os.getppid() != parent:
                os._exit(1)

        def read() -> None:
            other = _Report(self.tokenizer, self.settings, self.findings.keep)
            try:
                other.read(path, format, watch, second)
            except BadRow as bad:
                other.bad(bad)
            sender.send(other._state())

        process = fork.Process(target=read)
        process.start()
        sender.close()
        try:
            self.read(path, format, lambda rows, share: progress(rows + ahead.value, share), first)
            self._join(receiver.recv(), _lines_in(path, first))
        except EOFError:
            raise MemoryError("the second half was not read to its end") from None
        finally:
            process.kill()
            process.join()

    def _state(self) -> dict[str, Any]:
        problem = self.problem and (self.problem.line, self.problem.reason, self.problem.fix)
        return {name: getattr(self, name) for name in JOINED} | {"problem": problem}

    def _join(self, later: dict[str, Any], lines: int) -> None:
        """Adds the results of the half that starts after `lines` lines."""
        for name in ("rows", "characters", "non_ascii", "several"):
            setattr(self, name, getattr(self, name) + later[name])
        self.summary.join(later["summary"])
        for name in ("findings", "exact", "near", "prompts"):
            getattr(self, name).join(later[name], lines)
        self.tasks.join(later["tasks"])
        self.answers |= later["answers"]
        self.summary.kind = self.summary.kind or later["summary"].kind
        for name, count in later["unused"].items():
            self.unused[name] = self.unused.get(name, 0) + count
        if later["problem"] and not self.problem:
            line, reason, fix = later["problem"]
            self.problem = BadRow(line + lines, reason, fix)

    def _batches(
        self, path: Path, format: Format, part: ByteRange | None
    ) -> Iterable[list[tuple[Row, list[Tokens]]]]:
        if self.tokenizer is None:
            read = rows(path, format, on_bad=self.bad, part=part)
            read = numbered(read) if self.by_order else read
            return ([(row, []) for row in batch] for batch in batches(read))
        return encoded_batches(
            path, self.tokenizer, self.settings, format, self.bad, part, by_order=self.by_order
        )

    def row(self, row: Row, text: str, examples: list[Tokens]) -> None:
        tokenizer = self.tokenizer
        self.summary.kind = self.summary.kind or _kind(row)
        self._remember(row, text)
        self.tasks.add(row)
        for name in examples[0].unused if examples else row.unused:
            self.unused[name] = self.unused.get(name, 0) + 1
        untrained, lost = self.summary.untrained, self.summary.lost_tokens
        for example in examples:
            self.summary.add(example)
        if tokenizer is None:
            if len(self.samples) < SAMPLES:
                self.samples.append({"line": row.line, "preview": preview_of(row)})
            return
        if cut := self.summary.lost_tokens - lost:
            self.findings.add("truncated", row.line, f"{cut} {'token' if cut == 1 else 'tokens'} cut off")
        if len(examples) > 1 and row.kind == "chat":
            self.several += len(examples)
            self.findings.add("several_examples", row.line, f"{len(examples)} examples")
        if self.summary.untrained - untrained == len(examples):
            code = "answer_cut" if examples[0].targets[1] else "nothing_to_train"
            self.findings.add(code, row.line)
        elif row.kind == "chat" and not all(_ends(example, tokenizer) for example in examples):
            self.findings.add("missing_end", row.line)
        if len(self.samples) < SAMPLES and examples:
            self.samples.append(
                {
                    "line": row.line,
                    "preview": preview_of(row),
                    **colored_tokens(examples[0].example(), tokenizer),
                }
            )

    def _remember(self, row: Row, text: str) -> None:
        prompt, answer = question_and_answer(row)
        self.exact.add(text, row.line)
        self.near.add(f"{prompt}\n{normal(answer)}", row.line)
        if prompt:
            self.prompts.add(prompt, row.line)
        if len(self.answers) < 2:
            self.answers.add(fingerprint(_all_answers(row) or answer))

    def compare(self, validation: Path, format: Format | None = None) -> None:
        """Finds rows of the validation file that are also in the training file, whole or by their prompt."""
        rows_there, questions = DuplicateIndex(), DuplicateIndex()
        for row in rows(validation, format, on_bad=lambda bad: None):
            prompt, answer = question_and_answer(row)
            rows_there.add(f"{prompt}\n{normal(answer)}", row.line)
            if prompt:
                questions.add(prompt, row.line)
        for line in sorted({*self.near.common(rows_there), *self.prompts.common(questions)}):
            self.findings.add("leak", line)

    def finish(self, format: Format) -> dict[str, Any]:
        exact = dict(self.exact.repeats())
        for line, first in exact.items():
            self.findings.add("duplicate", line, f"same as line {first}")
        near = dict(self.near.repeats())
        for line, first in near.items():
            if line not in exact:
                self.findings.add("near_duplicate", line, f"same as line {first}")
        for line, first in self.prompts.repeats():
            if line not in near:
                self.findings.add("conflict", line, f"same prompt as line {first}")
        for name, count in sorted(self.unused.items(), key=lambda item: -item[1]):
            self.findings.add("unused_field", 0, f"{name} ({count:,} {'row' if count == 1 else 'rows'})")
        if self.several:
            rows = self.findings.counts["several_examples"]
            many = f"{rows:,} {'row becomes' if rows == 1 else 'rows become'} {self.several:,} examples"
            self.findings.details["several_examples"].insert(0, (0, many))
        alike = len(self.answers) == 1 and self.rows > 3 and self.summary.kind != "text"
        if alike and self.findings.counts.get("empty_answer", 0) < self.rows:
            self.findings.add("same_answer", 0)
        if 0 < self.rows < FEW and self.summary.kind != "text":
            self.findings.add("few", 0, f"{self.rows} {'example' if self.rows == 1 else 'examples'}")
        tokens = self.summary.tokens + self.summary.lost_tokens
        # Digits and code take many tokens too, and are not a sign of another language.
        if (
            self.non_ascii * 4 > self.characters
            and self.characters / max(tokens, 1) < CHARACTERS_PER_TOKEN
            and tokens > 200
        ):
            self.findings.add("poor_fit", 0, f"{self.characters / tokens:.1f} characters per token")
        if self.rows == 0 and self.problem is None and "left_out" not in self.findings.counts:
            self.bad(BadFile(0, "the file has no examples", "Upload a file with at least one example."))
        self.summary.task_rows = self.tasks.as_dict()
        return {
            **self.summary.as_dict(),
            "rows": self.rows,
            "characters": self.characters,
            "format": format.as_dict(),
            "sequence_length": self.settings.sequence_length,
            **self._verdict(),
            "findings": self.findings.as_list(),
            "samples": self.samples,
        }

    def _verdict(self) -> dict[str, Any]:
        """`ready` (some base can train on the file), `error` (why not, in one line), `verdict` (a sentence for
        users), and where the file is ready but not for this base, `refusal`: why."""
        counts = self.findings.counts
        if self.problem is not None:
            more = max(0, counts.get("bad_row", 0) - 1)
            also = f" {more} more {'row' if more == 1 else 'rows'} cannot be read." if more else ""
            where = f"Line {self.problem.line}: " if self.problem.line else ""
            reason = (
                self.problem.reason
                if where
                else f"{self.problem.reason[:1].upper()}{self.problem.reason[1:]}"
            )
            words = f"{where}{reason}. {self.problem.fix}{also}"
            return {"ready": False, "error": words, "verdict": words}
        if self.tokenizer is not None and not self.summary.trained_tokens:
            if refusal := self._refusal():
                return {"ready": True, "error": "", "verdict": refusal, "refusal": refusal}
            words = "No row has an answer to learn from. Add answers to the rows."
            return {"ready": False, "error": words, "verdict": words}
        many = f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}"
        serious = [f for f in self.findings.as_list() if f["severity"] != "info"]
        if not serious:
            return {"ready": True, "error": "", "verdict": f"{many}, no problems found."}
        worst = ", ".join(
            f"{f['title'][0].lower()}{f['title'][1:]}" + (f" ({f['count']:,})" if f["lines"] else "")
            for f in serious[:3]
        )
        return {"ready": True, "error": "", "verdict": f"{many} can be used for training. Check: {worst}."}

    def _refusal(self) -> str:
        """Why this base can train on none of the rows although another may; empty if no base can."""
        cut, left_out = (self.findings.counts.get(code, 0) for code in ("answer_cut", "left_out"))
        if left_out and not cut:
            reason = self.findings.details["left_out"][0][1]
            return (
                f"This base model cannot be trained on any of the rows: {reason}. "
                "Choose another base model, or change the rows."
            )
        if cut:
            return (
                "Every answer is cut off: the prompts alone fill the "
                f"{self.settings.sequence_length:,} tokens that are read of each row. "
                "Choose a base model with a longer context, or shorten the prompts."
            )
        return ""


def _all_answers(row: Row) -> str:
    """The answers of a conversation with more than one, tool calls included, since the last of each may be a
    mere "Bye"."""
    answers = [preview_of_message(m) for m in row.messages if m["role"] == "assistant"]
    return "\n".join(answers) if len(answers) > 1 else ""


def _kind(row: Row) -> str:
    """What a model that is trained on this learns: chat, completion, text, or preference."""
    return "preference" if row.rejected else "completion" if row.kind == "segments" else row.kind


def question_and_answer(row: Row) -> tuple[str, str]:
    """The normalized prompt and the answer of a row. Plain text has an empty prompt."""
    if row.kind == "completion":
        return normal(row.prompt), row.completion
    if row.kind == "text":
        return "", row.text
    if row.kind == "segments":
        trained = [i for i, (_, label) in enumerate(row.segments) if label]
        last = trained[-1] if trained else len(row.segments)
        before = "".join(text for text, _ in row.segments[:last])
        return normal(before), row.segments[last][0] if trained else ""
    last = len(row.messages) - 1
    while last >= 0 and row.messages[last]["role"] != "assistant":
        last -= 1
    before = row.messages[:last] if last >= 0 else row.messages
    prompt = "\n".join([f"{m['role']}: {m['content']}" for m in before])
    if last < 0:
        return normal(prompt), ""
    answer = row.messages[last]
    text = answer["content"] if len(answer) == 2 else preview_of_message(answer).removeprefix("assistant: ")
    return normal(prompt), text


def colored_tokens(example: Example, tokenizer: Tokenizer, limit: int = SAMPLE_TOKENS) -> dict[str, Any]:
    """The tokens of an example for a page: text, whether trained on, whether a line ends there."""
    texts = tokenizer.token_texts(example.ids[:limit])
    return {
        "tokens": [
            {"text": text, "trained": bool(trained), "breaks": text.endswith("\n")}
            for text, trained in zip(texts, example.mask, strict=False)
        ],
        "more": max(0, len(example.ids) - limit),
    }


def row_tokens(
    path: str | Path, line: int, tokenizer: Tokenizer, settings: EncodingOptions, format: Format | None = None
) -> dict[str, Any]:
    """The tokens of the row on `line`, and how many are cut off. Raises KeyError if no row begins there, and
    BadRow for one that can't be read."""

    def bad(bad: BadRow) -> None:
        if bad.line == line:
            raise bad

    tokenizer = as_reported(tokenizer, format)
    for row in rows(path, format, on_bad=bad):
        if row.line == line:
            encoded = encode_batch([row], tokenizer, settings)[0]
            if isinstance(encoded, BadRow):
                raise encoded
            shown = [colored_tokens(tokens.example(), tokenizer, ROW_TOKENS) for tokens in encoded]
            colored = [token for example in shown for token in example["tokens"]]
            return {
                "line": line,
                "preview": preview_of(row),
                "cut": sum(tokens.truncated for tokens in encoded),
                "tokens": colored[:ROW_TOKENS],
                "more": max(0, sum(tokens.length for tokens in encoded) - ROW_TOKENS),
            }
        if row.line > line:
            break
    raise KeyError(line)


def _ends(example: Tokens, tokenizer: Tokenizer) -> bool:
    """Whether generation stops at the last trained token, so that the model learns to stop."""
    return bool(example.truncated) or example.last_trained.endswith(tokenizer.ends.tokens)
