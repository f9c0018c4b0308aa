"""Base models through `/v1`: imported ones belong to all users, models of the Hub to those who added them."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.test import Client

from jobs.registry import base_models, imported_bases
from jobs.store import tables
from jobs.store.tables import HubModel
from tests.jobs.api.conftest import ApiUser
from tests.jobs.registry.test_bases import SNAPSHOT
from tests.training import tiny
from training.plan import catalog

pytestmark = pytest.mark.usefixtures("stores")


def ids(client: Client, user: ApiUser) -> set[str]:
    listed = client.get("/v1/models", headers=user.headers).json()["data"]
    return {model["id"] for model in listed}


def test_an_imported_base_is_everybodys_and_nobody_can_delete_it(
    client: Client, users: dict[str, ApiUser], tmp_path: Path
) -> None:
    folder = tiny.write_model(tmp_path / "model")
    name = tables.new_id("tiny")[:20]
    imported_bases.add(name, catalog.describe(folder).as_dict(), folder)
    for user in users.values():
        assert name in ids(client, user)
        shown = client.get(f"/v1/models/{name}", headers=user.headers).json()
        assert shown["llmtuner"]["kind"] == "base"
        refused = client.delete(f"/v1/models/{name}", headers=user.headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "not_deletable"
    imported_bases.remove(name)
    assert name not in ids(client, users["alice"])
    assert client.get(f"/v1/models/{name}", headers=users["alice"].headers).status_code == 404


def test_a_model_of_the_hub_is_taken_off_ones_own_list_only(
    client: Client, users: dict[str, ApiUser]
) -> None:
    for user in users.values():
        HubModel(user.owner, "people/tiny", snapshot=SNAPSHOT).save()
    reader = {"Authorization": f"Bearer {users['alice'].reader}"}
    assert client.delete("/v1/models/people/tiny", headers=reader).status_code == 403
    deleted = client.delete("/v1/models/people/tiny", headers=users["alice"].headers)
    assert deleted.json() == {"id": "people/tiny", "object": "model", "deleted": True}
    assert "people/tiny" not in ids(client, users["alice"])
    assert base_models.find(users["bob"].owner, "people/tiny")
    assert client.delete("/v1/models/people/tiny", headers=users["alice"].headers).status_code == 404


@pytest.fixture
def client() -> Client:
    """In this process; it sends each user's key."""
    return Client()
