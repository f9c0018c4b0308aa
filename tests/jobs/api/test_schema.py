"""Schemathesis generates valid and invalid requests from the OpenAPI document: no 5xx, nothing undocumented, no operation
without authentication, and no access to another user's resources.

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

from tests.jobs.api.conftest import ApiUser, make_api_user
from tests.jobs.api.resources import clear_limited_resources, create_resources, snapshot
from tests.services import ROOT

HERE = Path(__file__).parent
# Of each operation and phase.
EXAMPLES = [2, pytest.param(40, marks=[pytest.mark.campaign, pytest.mark.timeout(4200)])]
IDS = ("file_id", "job_id", "upload_id", "model", "webhook_endpoint_id")  # as named in the paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.parametrize("examples", EXAMPLES)]


@pytest.fixture(scope="module")
def server(web_with_inference: Any) -> Iterator[Any]:
    """The web process and an inference worker; what the tests created is deleted at the end."""
    yield web_with_inference
    for name in ("ALICE", "BOB", "CAROL"):
        clear_limited_resources(f"user-API{name}")


def write_config(
    folder: Path, users: dict[str, ApiUser], ids: dict[str, str], models: list[str], probability: float
) -> Path:
    """Write Schemathesis's settings: the callers, and IDs that exist, used with this probability."""
    credentials = [
        {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {user.key}"}]}
        for name, user in users.items()
    ]
    (folder / "users.json").write_text(json.dumps({"auth": credentials}))
    lines = [(HERE / "schemathesis.toml").read_text()]
    lines += ["[auth.wfc]", 'path = "users.json"']
    if len(users) > 1:
        lines += [f"peers = {json.dumps(list(users))}"]
    dictionaries = {name: [ids[name]] for name in IDS} | {"models": models}
    lines += [
        f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in dictionaries.items()
    ]
    parameters = {f"path.{name}": name for name in IDS}
    parameters |= {"body.training_file": "file_id", "body.model": "models"}
    lines += ["[parameters]"]
    lines += [
        f'"{place}" = {{ dictionary = "{name}", probability = {probability} }}'
        for place, name in parameters.items()
    ]
    path = folder / "schemathesis.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def count_operations(url: str, paths: str = "") -> int:
    """The number of operations in the document."""
    with urllib.request.urlopen(f"{url}/v1/openapi.json", timeout=30) as response:
        paths_in_document = json.load(response)["paths"]
    return sum(len(methods) for path, methods in paths_in_document.items() if re.search(paths, path))


def run_schemathesis(url: str, settings: Path, examples: int, *more: str) -> int:
    """Run Schemathesis and return the number of operations it tested; fail with its report."""
    argv = [str(ROOT / ".venv/bin/st"), "--config-file", str(settings), "run", f"{url}/v1/openapi.json"]
    argv += ["--request-timeout", "60", "--seed", "1", "--no-color", "--generation-deterministic", *more]
    # As long as a request may take at all: how busy the machine is decides nothing.
    argv += ["--max-examples", str(examples), "--max-response-time", "60"]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.jobs.api.schemathesis_hooks",
        "PYTHONPATH": str(ROOT),
    }
    completed = subprocess.run(
        argv,
        cwd=settings.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100 + 100 * examples,
    )
    assert completed.returncode == 0, completed.stdout[-8000:] + completed.stderr[-2000:]
    tested = re.search(r"Tested: (\d+)", completed.stdout)
    assert tested, completed.stdout[-2000:]
    return int(tested[1])


def test_the_api_matches_its_openapi_document(
    server: Any, users: dict[str, ApiUser], tmp_path: Path, examples: int
) -> None:
    ids = create_resources(users["alice"])
    # With the starter: Alice's own model has no files that could be loaded.
    settings = write_config(tmp_path, users, ids, ["starter"], 0.5)
    phases = ["--phases", "coverage,fuzzing,stateful"]
    # A well-formed ID may not exist, so a valid request need not get a 200.
    checks = ["--checks", "all", "--exclude-checks"]
    checks += ["positive_data_acceptance,other_users_resources_do_not_exist"]
    assert run_schemathesis(server.url, settings, examples, *phases, *checks) == count_operations(server.url)


def test_another_users_resources_do_not_exist(
    server: Any, users: dict[str, ApiUser], tmp_path: Path, examples: int
) -> None:
    carol = make_api_user("carol")  # the worker may still change what earlier tests left of Alice's
    ids = create_resources(carol)
    before = snapshot(carol, ids)
    argv = ["--phases", "fuzzing", "--mode", "positive"]
    argv += ["--checks", "other_users_resources_do_not_exist"]
    settings = write_config(tmp_path, {"bob": users["bob"]}, ids, [ids["model"]], 1.0)
    with_ids = r"\{|completions$"
    tested = run_schemathesis(server.url, settings, examples, *argv, "--include-path-regex", with_ids)
    assert tested == count_operations(server.url, with_ids)
    settings = write_config(tmp_path, {"bob": users["bob"]}, ids, ["starter"], 1.0)
    assert (
        run_schemathesis(server.url, settings, examples, *argv, "--include-name", "POST /v1/fine_tuning/jobs")
        == 1
    )
    assert snapshot(carol, ids) == before
