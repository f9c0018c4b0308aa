"""Names use the field's terms: no identifier has a word of the vocabulary that only this project had."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import ROOT

PACKAGES = ("llmtuner", "accounts", "jobs", "training", "tests", "benchmarks")

# The field's term -> words of a vocabulary that only this project had, and that no name may use any more
OLD_VOCABULARY = {
    "notify, enqueue, message": "bell bells ring rings rang rung",
    "outbox, finalize, exit diagnosis, resume check, export check": (
        "errand errands endings doctor proof proofs fidelity"
    ),
    "history, apply, event log": "story stories fold folds feed feeds",
    "emit, send, payload, message, event, received": "tell tells told say says said hear hears heard",
    "request, row, result, match, read": "ask asks asked wish wishes found look looks looked peek",
    "endpoint, environment, users, lease owner, snapshot": "door doors house people holder holders facts",
    "fingerprint, presenters, sandbox, deleted, limit": "mark marks showing reading gone bounded",
    "inference worker, prewarmed, stale worker, mutant": "relay relays standby zombie zombies plant plants",
}
OLD_WORDS = frozenset(" ".join(OLD_VOCABULARY.values()).split())
# file:name, or the name alone if it is allowed everywhere -> the reason
ALLOWED_NAMES = {
    "jobs/worker/tasks.py:errand": "the stored name of a Celery task",
    "not_found": "the name of status 404, in HTTP and in Django",
    "NotFound": "the name of status 404, in HTTP and in Django",
    "jobs/datasets/datasets.py:_mark_deleted": "to mark as deleted is the usual verb",
    "training/starter/text.py:PLANTS": "a topic of WordNet, noun.plant",
    "test_it_reads_all_encodings_and_line_endings": "a line ending is LF or CRLF",
}
# The name of a test is a sentence, where these are plain verbs ("is not found", "looks like an unknown one").
VERBS_OF_SENTENCES = {"found", "look", "looks", "looked", "reading", "mark", "marks", "say", "says"}


def names(tree: ast.AST) -> Iterator[str]:
    """All names that the code of a module defines: functions, classes, arguments, variables, attributes, import aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr
            case ast.alias(asname=str(alias)):
                yield alias
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                yield name


def old_words(name: str) -> set[str]:
    """The old words in a name, which is split at underscores and capitals."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    allowed = VERBS_OF_SENTENCES if name.startswith("test_") else set()
    return ({word.lower() for word in words} & OLD_WORDS) - allowed


def names_with_old_words(folder: Path, *packages: str) -> Iterator[tuple[str, str]]:
    """(file, name) of each, allowed ones included."""
    for path in (path for package in packages for path in (folder / package).rglob("*.py")):
        if "migrations" in path.parts:
            continue
        file = path.relative_to(folder)
        for name in {*file.with_suffix("").parts, *names(ast.parse(path.read_text()))}:
            if old_words(name):
                yield str(file), name


def test_no_name_has_a_word_of_the_old_vocabulary() -> None:
    old = [*names_with_old_words(ROOT, *PACKAGES)]
    qualified = {f"{file}:{name}" for file, name in old if name not in ALLOWED_NAMES}
    assert sorted(qualified - ALLOWED_NAMES.keys()) == []
    unused = ALLOWED_NAMES.keys() - {name for _, name in old} - {f"{file}:{name}" for file, name in old}
    assert unused == set()


PLANTED_NAMES = {
    "function": "def ring_for(job): ...",
    "async function": "async def look_up(job): ...",
    "class": "class JobStory: ...",
    "class with capitals": "class HTTPFeed: ...",
    "argument": "def run(*, told): ...",
    "variable": "lease_holder = 1",
    "loop variable": "squares = [said for said in range(3)]",
    "attribute": "job.is_gone = True",
    "import alias": "import json as doctor",
    "exception": "try: ...\nexcept ValueError as heard: ...",
    "capture": "match 1:\n case wish: ...",
}


@pytest.mark.parametrize("kind", PLANTED_NAMES)
def test_an_old_word_in_a_name_is_reported(kind: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "store.py").write_text(PLANTED_NAMES[kind])
    assert len([*names_with_old_words(tmp_path, "jobs")]) == 1


def test_an_old_word_in_the_name_of_a_module_is_reported(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "errands").mkdir(parents=True)
    (tmp_path / "jobs" / "errands" / "worker.py").write_text("")
    assert [*names_with_old_words(tmp_path, "jobs")] == [("jobs/errands/worker.py", "errands")]


def test_words_that_contain_an_old_word_are_not_reported() -> None:
    assert not any(
        old_words(name) for name in ("string", "task", "folder", "marker", "benchmark", "storyboard")
    )
