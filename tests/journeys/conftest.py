"""Journeys through the whole product, over the real stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.local_stack import LocalStack


@pytest.fixture(autouse=True)
def over_real_stores(stores: None) -> None:
    """Every page reads DynamoDB."""


@pytest.fixture
def local_stack(tmp_path: Path) -> Iterator[LocalStack]:
    """Not started yet, so that a test can change its environment before."""
    stack = LocalStack(tmp_path)
    yield stack
    stack.stop()
