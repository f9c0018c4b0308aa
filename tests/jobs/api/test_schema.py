"""Schemathesis reads the OpenAPI document and tries what it allows and forbids: no 5xx, nothing undocumented, no
call that forgets to ask who is there, and nothing of one person's for another.

`bin/test --all` tries twenty times as many examples.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.api.conftest import Person, make_person
from tests.jobs.api.things import clear, everything_of, put_things
from tests.services import ROOT

HERE = Path(__file__).parent
# Of each operation and phase.
EXAMPLES = [2, pytest.param(40, marks=[pytest.mark.campaign, pytest.mark.timeout(4200)])]
IDS = ("file_id", "job_id", "upload_id", "model", "webhook_endpoint_id")  # as the addresses call them

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.parametrize("examples", EXAMPLES)]


@pytest.fixture(scope="module")
def generating(web: Any) -> Iterator[Any]:
    """Web and a worker that writes text."""
    web.start_worker("inference")
    yield web
    web.stop("inference")
    for name in ("ALICE", "BOB", "CAROL"):
        clear(f"user-API{name}")


def config(
    folder: Path, people: dict[str, Person], ids: dict[str, str], models: list[str], probability: float
) -> Path:
    """Our settings for Schemathesis, who calls, and ids that exist among those it makes up."""
    who = [
        {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {person.key}"}]}
        for name, person in people.items()
    ]
    (folder / "people.json").write_text(json.dumps({"auth": who}))
    lines = [(HERE / "schemathesis.toml").read_text()]
    lines += ["[auth.wfc]", 'path = "people.json"']
    if len(people) > 1:
        lines += [f"peers = {json.dumps(list(people))}"]
    known = {name: [ids[name]] for name in IDS} | {"models": models}
    lines += [f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in known.items()]
    bound = {f"path.{name}": name for name in IDS}
    bound |= {"body.training_file": "file_id", "body.model": "models"}
    lines += ["[parameters]"]
    lines += [
        f'"{place}" = {{ dictionary = "{name}", probability = {probability} }}'
        for place, name in bound.items()
    ]
    path = folder / "schemathesis.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def operations(url: str, paths: str = "") -> int:
    """How many the document has."""
    with urllib.request.urlopen(f"{url}/v1/openapi.json", timeout=30) as answer:
        result = json.load(answer)["paths"]
    return sum(len(methods) for path, methods in result.items() if re.search(paths, path))


def schemathesis(url: str, settings: Path, examples: int, *more: str) -> int:
    """Runs it, and answers how many operations it tested. Fails with what it found."""
    argv = [str(ROOT / ".venv/bin/st"), "--config-file", str(settings), "run", f"{url}/v1/openapi.json"]
    argv += ["--request-timeout", "60", "--seed", "1", "--no-color", "--generation-deterministic", *more]
    argv += ["--max-examples", str(examples)]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.jobs.api.schemathesis_hooks",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        argv,
        cwd=settings.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100 + 100 * examples,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert tested, done.stdout[-2000:]
    return int(tested[1])


def test_the_document_tells_the_truth(
    generating: Any, people: dict[str, Person], tmp_path: Path, examples: int
):
    ids = put_things(people["alice"])
    settings = config(tmp_path, people, ids, ["starter"], 0.5)  # her own has no bytes to be loaded
    phases = ["--phases", "coverage,fuzzing,stateful"]
    # A well-formed id may name nothing, so a right request need not be answered with 200.
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance,others_things_do_not_exist"]
    assert schemathesis(generating.url, settings, examples, *phases, *checks) == operations(generating.url)


def test_for_bob_nothing_of_hers_exists(
    generating: Any, people: dict[str, Person], tmp_path: Path, examples: int
):
    carol = make_person(
        "carol"
    )  # the worker here still finishes what jobs of Alice left: nothing of hers stands still
    ids = put_things(carol)
    before = everything_of(carol, ids)
    argv = ["--phases", "fuzzing", "--mode", "positive"]
    argv += ["--checks", "others_things_do_not_exist"]
    settings = config(tmp_path, {"bob": people["bob"]}, ids, [ids["model"]], 1.0)
    with_ids = r"\{|completions$"
    tested = schemathesis(generating.url, settings, examples, *argv, "--include-path-regex", with_ids)
    assert tested == operations(generating.url, with_ids)
    settings = config(tmp_path, {"bob": people["bob"]}, ids, ["starter"], 1.0)
    assert (
        schemathesis(generating.url, settings, examples, *argv, "--include-name", "POST /v1/fine_tuning/jobs")
        == 1
    )
    assert everything_of(carol, ids) == before
