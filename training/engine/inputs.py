"""What a run starts from: the base model's folder, its tokenizer, the encoded examples and the resolved
settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.data.bad_row import BadBase, LeftOut
from training.data.formats import BadRow, Format, Row, detect_lenient, rows
from training.data.summary import ONE_ANSWER, PREFERENCES, Summary
from training.engine.objectives import OBJECTIVES, Objective
from training.engine.packing import Examples, hold_out
from training.models.config_json import read_config
from training.plan import auto_settings, catalog, hub, tasks
from training.plan.config import Settings
from training.plan.events import Failure
from training.plan.run_file import Run
from training.plan.warnings import batch_larger_than_data
from training.text.encode import EncodingOptions, Example
from training.text.tokenizer import Tokenizer, TokenizerError, midnight

PINNED = 3  # prompts for samples if none are given


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


@dataclass
class Inputs:
    objective: Objective
    base: Path
    model_config: dict[str, Any]
    tokenizer: Tokenizer
    train: Examples
    held_out: Examples
    settings: Settings  # every automatic field resolved
    reasons: dict[str, str]
    prompts: list[Prompt]
    notes: list[str]  # for the log
    task: dict[str, Any]  # see plan/tasks.py: describe
    stop: tuple[str, ...]  # texts that end an answer beside the end tokens


def read(run: Run, resolved: Settings | None = None) -> Inputs:
    """Reads and checks everything but the weights. `resolved` are the settings of an earlier attempt.
    Raises Failure."""
    objective = OBJECTIVES[(resolved or run.settings).objective]
    base = hub.locate(run.base, run.base_revision)
    model_config = _model_config(base)
    described = catalog.from_config(model_config, id=run.base, folder=str(base))
    tokenizer = _tokenizer(base, described.vocab)
    # One date for the whole run, however long it takes: a chat template may write it into every example.
    tokenizer.now = datetime.fromisoformat(run.date) if run.date else midnight()
    settings = resolved or run.settings
    notes: list[str] = []
    longest = settings.sequence_length or described.context
    wants = EncodingOptions(longest, settings.train_on)
    encode = partial(_encode, objective, tokenizer, wants, notes)
    counts = tasks.TaskCounts()
    everything = encode(run.train_file, run.train_format, forgiving=bool(run.expected), on_row=counts.add)
    task = _task(settings, counts.as_dict())
    # before anything is left out: the report counts all examples
    _check_counts(run.expected, everything)
    if resolved is None:
        settings, reasons = auto_settings.resolve(
            settings, Summary.of(everything), described, catalog.this_machine()
        )
    else:
        reasons = {}
    _check_context(everything, described.context)
    # An example without trained tokens has no loss; it would only cost time.
    rows = np.cumsum([example.part == 0 for example in everything])
    row_of = [int(row) for row, example in zip(rows, everything, strict=True) if example.trained]
    kept = [example for example in everything if example.trained]
    if len(kept) < len(everything):
        notes.append(f"{len(everything) - len(kept)} examples have no tokens to train on and are left out.")
    if not kept:
        raise Failure("no_trained_token", f"None of the {len(everything)} examples has a token to train on.")
    train, held_out = Examples.of(kept), Examples.of([])
    if run.validation_file:
        held = encode(run.validation_file, run.validation_format, forgiving=True)
        _check_context(held, described.context)
        # Validation examples that are also trained on would measure memorization.
        seen = {tuple(example.ids) for example in kept}
        fresh = [example for example in held if tuple(example.ids) not in seen]
        held_out = Examples.of([example for example in fresh if example.trained])
        if leaked := len(held) - len(fresh):
            notes.append(
                f"{leaked} of {len(held)} validation examples are also in the training data and are left out of the validation."
            )
    elif settings.validation_fraction:
        train, held_out = hold_out(train, settings.validation_fraction, settings.seed, row_of)
    if settings.early_stopping_patience and not len(held_out):
        notes.append("Early stopping has no effect, because no examples are held out.")
    batch = batch_larger_than_data(settings, len(train), int(train.lengths.sum()))
    if batch is not None:
        notes.append(f"{batch.title}. {batch.text}")
    chat = _first_row(run).kind == "chat"
    prompts = _prompts(run, tokenizer, held_out if len(held_out) else train, chat)
    return Inputs(
        objective,
        base,
        model_config,
        tokenizer,
        train,
        held_out,
        settings,
        reasons,
        prompts,
        notes,
        task,
        tokenizer.ends.texts if chat else (),
    )


def _model_config(base: Path) -> dict[str, Any]:
    values = read_config(base)
    try:
        catalog.from_config(values)
    except (ValueError, TypeError) as error:
        raise Failure("base_model", f"The model in {base} cannot be used: {error}.") from error
    return values


def _tokenizer(base: Path, vocabulary: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(base)
        # a token id beyond the embedding table would crash deep inside the model
        highest = max([*tokenizer.backend.get_vocab(with_added_tokens=True).values(), tokenizer.eos_id])
    except TokenizerError as error:
        raise Failure("tokenizer", f"The tokenizer in {base} cannot be used: {error}.") from error
    if highest >= vocabulary:
        raise Failure(
            "tokenizer", f"The tokenizer has {highest + 1} tokens, but the model has only {vocabulary}."
        )
    return tokenizer


def _encode(
    objective: Objective,
    tokenizer: Tokenizer,
    wants: EncodingOptions,
    notes: list[str],
    path: str,
    format: dict[str, Any] | None,
    *,
    forgiving: bool,
    on_row: Callable[[Row], None] | None = None,
) -> list[Example]:
    """Every example of a file. A bad row raises Failure unless a report has already shown it to the user
    (`forgiving`)."""
    bad: list[BadRow] = []

    def on_bad(row: BadRow) -> None:
        if not forgiving and not isinstance(row, LeftOut):
            raise row
        bad.append(row)

    try:
        chosen = Format.of(format) if format else None
        if (chosen or detect_lenient(path)).shape == "preference":
            raise Failure("bad_data", PREFERENCES, ONE_ANSWER)
        encoded = list(objective.encode(path, tokenizer, wants, chosen, on_bad, on_row))
    except BadBase as error:
        reason = f"{error.reason[:1].upper()}{error.reason[1:]}."
        raise Failure("base_model", reason, error.fix) from error
    except BadRow as error:
        fix = f" {error.fix}" if error.fix else ""
        raise Failure("bad_data", f"{Path(path).name}, {error}.{fix}") from error
    except OSError as error:
        raise Failure("bad_data", f"The file {path} cannot be read: {error}") from error
    if bad:
        notes.append(
            f"{len(bad)} rows of {Path(path).name} cannot be used and are left out. The first: {bad[0]}."
        )
    if not encoded:
        raise Failure("bad_data", f"There are no examples in {Path(path).name}.")
    return encoded


def _check_counts(expected: dict[str, int] | None, encoded: list[Example]) -> None:
    """The trainer must count exactly what the report counted."""
    counts = {"examples": len(encoded), "tokens": sum(len(example.ids) for example in encoded)}
    for what, count in counts.items():
        if expected and expected.get(what) not in (None, count):
            raise Failure(
                "bad_data",
                f"The dataset's report counted {expected[what]} {what}, but the trainer counted {count}.",
                "Check the dataset again: the file or the tokenizer has changed since the report.",
            )


def _check_context(encoded: Iterable[Example], context: int) -> None:
    for example in encoded:
        if len(example.ids) > context:
            raise Failure(
                "too_long",
                f"The example on line {example.line} has {len(example.ids)} tokens. The model's context is {context}.",
                f"Set sequence_length to {context} or less to cut it, or shorten the example.",
            )


def _task(settings: Settings, counts: tasks.Counts) -> dict[str, Any]:
    """The task, chosen or guessed from the rows. Raises Failure if they cannot be used for the chosen one."""
    if refusal := tasks.refusal(settings.task, counts):
        raise Failure("bad_settings", f"task: {refusal}")
    return tasks.describe(settings.task, counts)


def _first_row(run: Run) -> Row:
    """The first readable row of the training file."""
    format = Format.of(run.train_format) if run.train_format else None
    return next(rows(run.train_file, format, on_bad=lambda bad: None))


def _prompts(run: Run, tokenizer: Tokenizer, examples: Examples, chat: bool) -> list[Prompt]:
    """The pinned prompts: those given, otherwise the first examples up to their answers."""
    if run.prompts:
        return [Prompt(text, _prompt_ids(text, tokenizer, chat)) for text in run.prompts]
    prompts = []
    for i in range(min(PINNED, len(examples))):
        ids, mask = examples[i]
        # up to the first trained token, and at least one token
        begin = ids[: max(1, int(np.argmax(mask)))].tolist()
        prompts.append(Prompt(tokenizer.decode(begin), begin))
    return prompts


def _prompt_ids(text: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return begin + tokenizer.encode(text)


def fingerprint(*parts: Any) -> str:
    """sha256 of values that must not change between attempts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
