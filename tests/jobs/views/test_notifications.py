"""The page where a user sets how to be notified when a job ends."""

from __future__ import annotations

from typing import Any

import pytest
from django.core import mail
from django.test import Client

from accounts.models import User
from jobs.lifecycle import finalize, transitions
from jobs.notifications import webhooks
from jobs.store import access, tables
from jobs.store.states import JobStatus
from jobs.store.tables import WebhookDelivery, WebhookEndpoint
from tests.factories import browser_of, make_user
from tests.jobs.makers import make_claim, make_job, result
from tests.jobs.views.makers import make_dataset

PAGE = "/notifications/"


def add(client: Client, **fields: Any) -> Any:
    return client.post(PAGE, {"url": "https://example.com/hook", "events": webhooks.EVENT_TYPES, **fields})


def only_endpoint(owner: str) -> WebhookEndpoint:
    (row,) = webhooks.list_endpoints(owner)
    return row


def test_an_empty_page_explains_what_to_do(alices: Client) -> None:
    text = alices.get(PAGE).content.decode()
    assert "No webhooks yet. Add a URL" in text
    assert "No deliveries yet" in text


def test_a_webhook_is_added_and_its_secret_shown_once(alices: Client, alice: User) -> None:
    response = add(alices, name="My script", events=["fine_tuning.job.failed"])
    row = only_endpoint(alice.owner_id)
    assert response.status_code == 200
    assert row.secret in response.content.decode()
    assert (row.name, row.events) == ("My script", ["fine_tuning.job.failed"])
    later = alices.get(PAGE).content.decode()
    assert "https://example.com/hook" in later
    assert row.secret not in later


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"url": "http://example.com/"}, "https://"),
        ({"url": "ftp://x"}, "https://"),
        ({"events": []}, "Choose at least one"),
        ({"name": "x" * 81}, "80 characters"),
    ],
)
def test_an_invalid_webhook_is_rejected_with_a_reason(
    alices: Client, alice: User, fields: dict[str, Any], expected: str
) -> None:
    response = add(alices, **fields)
    assert response.status_code == 400
    assert expected in response.content.decode()
    assert not webhooks.list_endpoints(alice.owner_id)


def test_a_test_event_is_queued_and_listed(alices: Client, alice: User) -> None:
    add(alices)
    row = only_endpoint(alice.owner_id)
    response = alices.post(f"{PAGE}{row.endpoint_id}/test/", follow=True)
    assert "A test event is being sent" in response.content.decode()
    (delivery,) = tables.rows(WebhookDelivery, alice.owner_id)
    assert (delivery.event, delivery.status) == (webhooks.TEST_TYPE, "pending")
    WebhookDelivery(alice.owner_id, delivery.delivery_id).update(
        actions=[WebhookDelivery.status.set("given up"), WebhookDelivery.last_result.set("answered 500")]
    )
    assert "not delivered: answered 500" in alices.get(PAGE).content.decode()


def test_too_many_test_events_are_reported(alices: Client, alice: User, settings: Any) -> None:
    settings.JOBS = settings.JOBS | {"max_webhook_tests_per_owner": 1}
    add(alices)
    path = f"{PAGE}{only_endpoint(alice.owner_id).endpoint_id}/test/"
    alices.post(path)
    assert "You can send 1 test events a minute" in alices.post(path, follow=True).content.decode()
    assert len(list(tables.rows(WebhookDelivery, alice.owner_id))) == 1


def test_a_webhook_is_deleted(alices: Client, alice: User) -> None:
    add(alices)
    alices.post(f"{PAGE}{only_endpoint(alice.owner_id).endpoint_id}/delete/")
    assert not webhooks.list_endpoints(alice.owner_id)


def test_another_users_webhook_is_not_found(alices: Client, alice: User, bobs: Client) -> None:
    add(alices, url="https://alice.example/hook")
    row = only_endpoint(alice.owner_id)
    for action in ("test", "delete"):
        assert bobs.post(f"{PAGE}{row.endpoint_id}/{action}/").status_code == 404
    assert row.url not in bobs.get(PAGE).content.decode()
    assert tables.get(WebhookEndpoint, alice.owner_id, row.endpoint_id)


def test_email_follows_the_setting_at_the_end_of_the_job(db: None) -> None:
    user = make_user("mail")
    browser = browser_of(user)
    for wanted in ("0", "1"):
        sent_before = len(mail.outbox)
        dataset = make_dataset(user.owner_id)
        browser.post(f"{PAGE}email/", {"wanted": str(1 - int(wanted))})
        browser.post("/jobs/new/", {"dataset": dataset.dataset_id, "base": "starter"})
        browser.post(f"{PAGE}email/", {"wanted": wanted})
        job = access.list_jobs(user.owner_id).rows[0]
        transitions.set_desired(user.owner_id, job.job_id, "cancel")
        finalize.after_end(user.owner_id, job.job_id)
        assert webhooks.deliver(user.owner_id, f"{job.job_id}#cancelled#email")
        assert len(mail.outbox) - sent_before == int(wanted)


def test_email_about_jobs_can_be_turned_off(db: None) -> None:
    user = make_user("mail")
    claim = make_claim(make_job(user.owner_id))
    claim.finish(JobStatus.SUCCEEDED, result=result(claim))
    delivery = WebhookDelivery(
        user.owner_id, f"{claim.job_id}#succeeded#email", job_id=claim.job_id, event="x", payload="{}"
    )
    tables.put_new(delivery)
    browser_of(user).post(f"{PAGE}email/", {"wanted": "0"})
    assert webhooks.deliver(user.owner_id, delivery.delivery_id)
    assert not mail.outbox
    row = tables.get(WebhookDelivery, user.owner_id, delivery.delivery_id)
    assert row is not None
    assert (row.status, row.last_result) == ("given up", "email is turned off")
