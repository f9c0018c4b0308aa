"""Pages are requested with Django's test client and use the real stores."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def use_stores(stores: None) -> None:
    """Every page reads DynamoDB."""
