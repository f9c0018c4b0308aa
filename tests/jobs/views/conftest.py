"""Pages over the real stores, requested by Django's test client."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def over_real_stores(stores: None) -> None:
    """Every page reads DynamoDB."""
