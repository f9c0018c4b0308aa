"""The processes and their configuration, over the real stores."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def over_real_stores(stores: None) -> None:
    """Every page reads DynamoDB."""
