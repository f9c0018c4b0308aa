"""Fixtures shared by all tests: the real stores, the users, and a running studio."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from django.core.cache import cache

from tests import services
from tests.factories import browser_of, make_user

if TYPE_CHECKING:
    from django.test import Client

    from accounts.models import User

ROOT = services.ROOT


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files with slow tests first, so that no process is left with a long one at the end. The order is otherwise kept."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def folder() -> Path:
    return Path(os.environ["LLMTUNER_TEST_DIR"])


@pytest.fixture(scope="session")
def django_db_modify_db_settings_xdist_suffix() -> None:
    """Keeps the name of the database in parallel processes. Each has its own folder, and web opens the database there."""


@pytest.fixture(scope="session")
def dynamodb(folder: Path) -> Iterator[services.Service]:
    service = services.dynamodb(folder, int(os.environ["DYNAMODB_PORT"])).start()
    from jobs.store.tables import create_tables

    create_tables()
    yield service
    service.kill()


@pytest.fixture(scope="session")
def redis(folder: Path) -> Iterator[services.Service]:
    service = services.redis(folder, int(os.environ["REDIS_PORT"])).start()
    yield service
    service.kill()


@pytest.fixture(scope="session")
def stores(dynamodb: services.Service, redis: services.Service) -> None:
    """Real DynamoDB with our tables, and real Redis."""


@pytest.fixture
def rate_limits(redis: services.Service) -> Iterator[None]:
    """Clears the counters of sign-ins and sign-ups before and after the test, since all tests use one IP address."""
    cache.clear()
    yield
    cache.clear()


@pytest.fixture
def alice(db: None) -> User:
    """Alice owns things."""
    return make_user("alice")


@pytest.fixture
def bob(db: None) -> User:
    """Bob is another customer."""
    return make_user("bob")


@pytest.fixture
def sam(db: None) -> User:
    """Sam is staff."""
    return make_user("sam", is_staff=True, is_superuser=True)


@pytest.fixture
def alices(alice: User) -> Client:
    """Alice's browser."""
    return browser_of(alice)


@pytest.fixture
def bobs(bob: User) -> Client:
    return browser_of(bob)


@pytest.fixture
def sams(sam: User) -> Client:
    return browser_of(sam)


@dataclass
class Studio:
    """Web and workers, started as in production, over the test's stores."""

    url: str
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "WEB_PORT": self.url.rsplit(":", 1)[1],
            **self.environment,
        }
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", *argv],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=services._die_with_parent,
        )
        return self.processes[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start_worker(self, queue: str) -> subprocess.Popen[bytes]:
        return self.start(queue, "llmtuner", "worker", queue)

    def start_web(self) -> subprocess.Popen[bytes]:
        process = self.start("web", "llmtuner", "web")
        for _ in range(900):
            try:
                urllib.request.urlopen(f"{self.url}/healthz", timeout=2)
            except OSError:
                assert process.poll() is None, self.log("web")
                time.sleep(0.1)
            else:
                return process
        raise RuntimeError(self.log("web"))

    def stop(self, *names: str) -> None:
        services.terminate([self.processes.pop(name) for name in names or list(self.processes)])


@pytest.fixture(scope="session")
def web(stores: None, django_db_setup: None, folder: Path) -> Iterator[Studio]:
    """A running web process. Users made in tests must be committed: use `transactional_db`."""
    # All tests use one IP address. tests/llmtuner/test_connections.py starts web with the default limit.
    unlimited = {"WEB_MAX_CONNECTIONS_PER_ADDRESS": "0"}
    studio = Studio(os.environ["PUBLIC_URL"], folder, environment=unlimited)
    studio.start_web()
    yield studio
    studio.stop()


@pytest.fixture(scope="module")
def studio(web: Studio) -> Iterator[Studio]:
    """The whole studio: web and the four kinds of worker. They stop after the module, because they would take the work that
    other tests do by hand."""
    from jobs.store import queue

    for row in queue.index_rows():  # jobs that other tests left, which real workers would start with
        row.delete()
    queues = ("checks", "notifications", "training", "inference")
    for name in queues:
        web.start_worker(name)
    yield web
    web.stop(*(name for name in queues if name in web.processes))


@pytest.fixture
def start_web(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a web process with these settings for this test alone, and returns its port."""
    studios = []

    def start(**environment: str) -> int:
        port = services.free_port()
        studio = Studio(f"http://localhost:{port}", tmp_path, environment=environment)
        studios.append(studio)
        studio.start_web()
        return port

    yield start
    for studio in studios:
        studio.stop()
