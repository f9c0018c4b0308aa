"""The page where a person says how to be told of a job's end."""

from __future__ import annotations

import pytest
from django.core import mail

from jobs.lifecycle import finalize, transitions
from jobs.notifications import webhooks
from jobs.store import access, tables
from jobs.store.tables import WebhookDelivery, WebhookEndpoint
from tests.factories import browser_of, make_user
from tests.jobs.makers import make_claim, make_job, result
from tests.jobs.views.makers import make_dataset

PAGE = "/notifications/"


def add(client, **fields):
    return client.post(PAGE, {"url": "https://example.com/hook", "events": webhooks.EVENT_TYPES, **fields})


def only(owner):
    (row,) = webhooks.list_endpoints(owner)
    return row


def test_an_empty_page_says_what_to_do(alices):
    text = alices.get(PAGE).content.decode()
    assert "No webhooks yet. Add a URL" in text
    assert "No deliveries yet" in text


def test_a_webhook_is_added_and_its_secret_shown_once(alices, alice):
    answer = add(alices, name="My script", events=["fine_tuning.job.failed"])
    row = only(alice.owner_id)
    assert answer.status_code == 200
    assert row.secret in answer.content.decode()
    assert (row.name, row.events) == ("My script", ["fine_tuning.job.failed"])
    later = alices.get(PAGE).content.decode()
    assert "https://example.com/hook" in later
    assert row.secret not in later


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://example.com/"}, "https://"),
        ({"url": "ftp://x"}, "https://"),
        ({"events": []}, "Choose at least one"),
        ({"name": "x" * 81}, "80 characters"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(alices, alice, fields, words):
    answer = add(alices, **fields)
    assert answer.status_code == 400
    assert words in answer.content.decode()
    assert not webhooks.list_endpoints(alice.owner_id)


def test_a_test_event_is_put_and_listed(alices, alice):
    add(alices)
    row = only(alice.owner_id)
    answer = alices.post(f"{PAGE}{row.endpoint_id}/test/", follow=True)
    assert "A test event is being sent" in answer.content.decode()
    (delivery,) = tables.rows(WebhookDelivery, alice.owner_id)
    assert (delivery.event, delivery.status) == (webhooks.TEST_TYPE, "pending")
    WebhookDelivery(alice.owner_id, delivery.delivery_id).update(
        actions=[WebhookDelivery.status.set("given up"), WebhookDelivery.last_result.set("answered 500")]
    )
    assert "not delivered: answered 500" in alices.get(PAGE).content.decode()


def test_the_page_says_when_there_were_too_many_tests(alices, alice, settings):
    settings.JOBS = settings.JOBS | {"max_webhook_tests_per_owner": 1}
    add(alices)
    path = f"{PAGE}{only(alice.owner_id).endpoint_id}/test/"
    alices.post(path)
    assert "You can send 1 test events a minute" in alices.post(path, follow=True).content.decode()
    assert len(list(tables.rows(WebhookDelivery, alice.owner_id))) == 1


def test_a_webhook_is_deleted(alices, alice):
    add(alices)
    alices.post(f"{PAGE}{only(alice.owner_id).endpoint_id}/delete/")
    assert not webhooks.list_endpoints(alice.owner_id)


def test_another_s_webhook_is_not_there(alices, alice, bobs):
    add(alices, url="https://alice.example/hook")
    row = only(alice.owner_id)
    for what in ("test", "delete"):
        assert bobs.post(f"{PAGE}{row.endpoint_id}/{what}/").status_code == 404
    assert row.url not in bobs.get(PAGE).content.decode()
    assert tables.get(WebhookEndpoint, alice.owner_id, row.endpoint_id)


def test_mail_is_sent_as_wanted_when_the_job_ends_not_when_it_began(db):
    user = make_user("mail")
    page = browser_of(user)
    for wanted in ("0", "1"):
        sent = len(mail.outbox)
        dataset = make_dataset(user.owner_id)
        page.post(f"{PAGE}email/", {"wanted": str(1 - int(wanted))})
        page.post("/jobs/new/", {"dataset": dataset.dataset_id, "base": "starter"})
        page.post(f"{PAGE}email/", {"wanted": wanted})
        job = access.list_jobs(user.owner_id).rows[0]
        transitions.set_desired(user.owner_id, job.job_id, "cancel")
        finalize.after_end(user.owner_id, job.job_id)
        assert webhooks.deliver(user.owner_id, f"{job.job_id}#cancelled#email")
        assert len(mail.outbox) - sent == int(wanted)


def test_mail_about_jobs_can_be_turned_off(db):
    user = make_user("mail")
    claim = make_claim(make_job(user.owner_id))
    claim.finish("succeeded", result=result(claim))
    delivery = WebhookDelivery(
        user.owner_id, f"{claim.job_id}#succeeded#email", job_id=claim.job_id, event="x", payload="{}"
    )
    tables.put_new(delivery)
    browser_of(user).post(f"{PAGE}email/", {"wanted": "0"})
    assert webhooks.deliver(user.owner_id, delivery.delivery_id)
    assert not mail.outbox
    row = tables.get(WebhookDelivery, user.owner_id, delivery.delivery_id)
    assert (row.status, row.last_result) == ("given up", "email is turned off")
