"""Objects of another user do not exist: every URL, requested by the wrong user."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.datasets import multipart
from jobs.notifications import webhooks
from jobs.urls import urlpatterns
from tests.jobs.views.makers import make_dataset, make_job, make_model

POSTS = {
    "upload", "delete_dataset", "fix_dataset", "estimate", "pause_job", "resume_job", "cancel_job", "retry_job", "rename_job",
    "delete_job", "delete_model", "playground_stream", "notify_by_email", "test_webhook", "delete_webhook",
    "dataset_columns", "dataset_row", "read_as", "model_names", "count_tokens", "add_base", "remove_base",
    "begin_upload", "upload_links", "complete_upload", "cancel_upload", "row_draft",
}  # fmt: skip
PUTS = {"upload_part"}
SECOND = {"upload_part": 1, "edit_row": 1}  # the second argument: part or line 1
# A signed link is its own permission; tests/jobs tests those.
NAMES = [p.name for p in urlpatterns if "token" not in p.pattern.converters]


def parameter(name: str) -> str | None:
    pattern = next(p for p in urlpatterns if p.name == name)
    return next(iter(pattern.pattern.converters), None)


def address_of(name: str, *args: str) -> str:
    return reverse(f"jobs:{name}", args=[*args, SECOND[name]] if name in SECOND else args)


def request(client: Client, name: str, *args: str):
    address = address_of(name, *args)
    if name in PUTS:
        return client.put(address)
    return client.post(address) if name in POSTS else client.get(address)


@pytest.fixture
def objects(alice: User) -> dict[str, str]:
    return {
        "dataset_id": make_dataset(alice.owner_id).dataset_id,
        "job_id": make_job(alice.owner_id, "succeeded").job_id,
        "model_id": make_model(alice.owner_id).model_id,
        "upload_id": multipart.begin(alice.owner_id, "rows.jsonl", 10).upload_id,
        "webhook_endpoint_id": webhooks.add_endpoint(alice.owner_id, "https://example.com/hook").endpoint_id,
    }


@pytest.mark.parametrize("name", [name for name in NAMES if parameter(name)])
def test_bob_gets_404_for_what_is_alices(bobs: Client, objects: dict[str, str], name: str) -> None:
    response = request(bobs, name, objects[parameter(name) or ""])
    unknown = request(bobs, name, "does-not-exist")
    assert response.status_code == unknown.status_code == 404


@pytest.mark.parametrize("name", NAMES)
def test_a_visitor_is_redirected_to_sign_in(client: Client, objects: dict[str, str], name: str) -> None:
    kind = parameter(name)
    response = request(client, name, *([objects[kind]] if kind else []))
    assert response.status_code == 302
    assert response["Location"].startswith("/accounts/login/")


@pytest.mark.parametrize("name", NAMES)
def test_other_methods_are_refused(alices: Client, objects: dict[str, str], name: str) -> None:
    kind = parameter(name)
    address = address_of(name, *([objects[kind]] if kind else []))
    assert alices.delete(address).status_code == 405
    if name in POSTS | PUTS:
        assert alices.get(address).status_code == 405


@pytest.mark.parametrize("name", sorted(POSTS | PUTS))
def test_a_post_without_a_csrf_token_is_refused(alice: User, objects: dict[str, str], name: str) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice, backend="allauth.account.auth_backends.AuthenticationBackend")
    kind = parameter(name)
    assert request(strict, name, *([objects[kind]] if kind else [])).status_code == 403


def test_alice_gets_all_her_pages(alices: Client, objects: dict[str, str]) -> None:
    for name in NAMES:
        kind = parameter(name)
        if name not in POSTS | PUTS:
            assert request(alices, name, *([objects[kind]] if kind else [])).status_code in (200, 302), name


def test_bobs_lists_contain_nothing_of_alices(bobs: Client, alice: User) -> None:
    make_dataset(alice.owner_id, name="canary.jsonl")
    make_job(alice.owner_id, name="canary job")
    make_model(alice.owner_id, name="canary model")
    for name in ("datasets", "jobs", "models", "playground", "new_job"):
        assert b"canary" not in request(bobs, name).content


def test_bob_cannot_start_a_job_with_alices_data(bobs: Client, objects: dict[str, str]) -> None:
    response = bobs.post(reverse("jobs:new_job"), {"dataset": objects["dataset_id"], "base": "starter"})
    assert response.status_code == 422
    assert b"This dataset was deleted" in response.content or b"Upload a dataset first" in response.content


def test_bob_cannot_clone_alices_job(bobs: Client, objects: dict[str, str]) -> None:
    assert bobs.get(reverse("jobs:new_job"), {"clone": objects["job_id"]}).status_code == 404
