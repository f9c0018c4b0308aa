"""llmtuner/processes.py defines how processes are started. Everything else uses its two commands."""

from __future__ import annotations

import re

import pytest
import yaml

from llmtuner.processes import QUEUES, worker_arguments
from tests.services import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
FOLDERS = ("accounts", "benchmarks", "bin", "docs", "jobs", "llmtuner", "tests", "training")
OWN_COMMAND = re.compile(r"celery\W+-A\W+llmtuner|uvicorn\W+llmtuner\.asgi")  # also as a list of words


def test_no_other_file_starts_web_or_a_worker_with_another_command():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    texts = {path: path.read_bytes().decode(errors="replace") for path in paths if path.suffix != ".pyc"}
    others = {str(path.relative_to(ROOT)) for path, text in texts.items() if OWN_COMMAND.search(text)}
    # stack.py also starts the first release, which only has this command.
    assert others <= {"docs/log.md", "tests/golden/stack.py"}


def test_compose_runs_web_and_a_worker_of_each_queue():
    commands = {service.get("command") for service in COMPOSE["services"].values()}
    assert {f"python -m llmtuner worker {queue}" for queue in QUEUES} <= commands
    assert 'CMD ["python", "-m", "llmtuner", "web"]' in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("queue", QUEUES)
def test_a_worker_sends_no_messages_to_other_workers(queue: str):
    assert {"--without-gossip", "--without-mingle", "--without-heartbeat"} <= set(worker_arguments(queue))
