"""The account pages: overview, devices, export, deletion."""

from __future__ import annotations

import json
import re
import time

import pytest
from allauth.account.models import EmailAddress
from allauth.usersessions.models import UserSession
from django.core import mail
from django.test import Client

from accounts import api_keys
from accounts.models import ApiKey, User
from jobs.notifications import webhooks
from jobs.store import tables
from jobs.store.tables import WebhookEndpoint
from tests.accounts.conftest import is_signed_in, sign_in
from tests.accounts.test_sign_in import change_address
from tests.factories import PASSWORD

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"


@pytest.fixture
def work(stores, alice: User):
    """A dataset and a finished job of Alice."""
    from jobs.store.tables import Dataset, Job, new_id

    dataset = Dataset(alice.owner_id, new_id("file"), name="alices-letters.jsonl", status="ready")
    job = Job(
        alice.owner_id,
        new_id("ftjob"),
        name="Alice's letters",
        status="failed",
        base="starter",
        created_at=time.time(),
        ended_at=time.time(),
    )
    dataset.save()
    job.save()
    return dataset, job


def reauthenticate(page: Client, address: str) -> None:
    assert page.get(address).status_code == 302
    page.post("/accounts/reauthenticate/", {"password": PASSWORD})


@pytest.mark.parametrize("address", ["/account/", "/account/export/", "/account/delete/", "/account/keys/"])
def test_visitors_are_redirected_to_sign_in(db, page: Client, address: str):
    assert page.get(address).headers["Location"] == f"/accounts/login/?next={address}"


def test_the_overview_shows_the_email_and_signed_in_devices(alice: User, page: Client):
    sign_in(page, alice)
    text = page.get("/account/").content.decode()
    assert alice.email in text
    assert "1 signed in" in text


def test_a_device_can_be_signed_out_from_another(alice: User, page: Client):
    lost = Client()
    sign_in(page, alice)
    sign_in(lost, alice, **{"User-Agent": FIREFOX})
    assert "Firefox on Linux" in page.get("/accounts/sessions/").content.decode()
    device = UserSession.objects.get(user=alice, user_agent=FIREFOX)
    page.post(f"/account/devices/{device.pk}/sign-out/")
    assert not is_signed_in(lost)
    assert is_signed_in(page)


def test_bob_cannot_sign_out_alices_device(alice: User, bob: User, page: Client):
    alices = Client()
    sign_in(alices, alice)
    sign_in(page, bob)
    device = UserSession.objects.get(user=alice)
    assert page.post(f"/account/devices/{device.pk}/sign-out/").status_code == 404
    assert is_signed_in(alices)


def test_the_email_address_changes_once_the_new_one_is_confirmed(alice: User, page: Client):
    owner, old = alice.owner_id, alice.email
    sign_in(page, alice)
    change_address(page, "new@example.com")
    assert mail.outbox[-1].to == ["new@example.com"]
    alice.refresh_from_db()
    assert alice.email == old
    assert "web server's log" in page.get("/accounts/email/").content.decode()
    link = re.search(r"http://testserver(/accounts/confirm-email/\S+)", mail.outbox[-1].body)
    assert link
    assert "new@example.com" in page.get(link[1]).content.decode()
    page.post(link[1])
    alice.refresh_from_db()
    assert (alice.email, alice.owner_id) == ("new@example.com", owner)
    assert list(EmailAddress.objects.filter(user=alice).values_list("email", "verified")) == [
        ("new@example.com", True)
    ]
    fresh = Client()
    sign_in(fresh, alice)
    assert is_signed_in(fresh)


def test_job_emails_go_to_the_new_address_once_it_is_confirmed(stores, alice: User, page: Client):
    webhooks.set_email(alice.owner_id, alice.notification_email)
    sign_in(page, alice)
    change_address(page, "new@example.com")
    link = re.search(r"http://testserver(/accounts/confirm-email/\S+)", mail.outbox[-1].body)
    assert link
    assert mailbox(alice) == f"mailto:{alice.email}"
    page.post(link[1])
    assert mailbox(alice) == "mailto:new@example.com"


def test_a_deactivated_user_gets_no_job_emails(stores, alice: User):
    webhooks.set_email(alice.owner_id, alice.notification_email)
    alice.is_active = False
    alice.save()
    assert mailbox(alice) == ""


def mailbox(user: User) -> str:
    row = tables.get(WebhookEndpoint, user.owner_id, webhooks.EMAIL)
    return row.url if row and row.active else ""


def test_a_user_cannot_take_another_users_email_address(alice: User, bob: User, page: Client):
    sign_in(page, alice)
    change_address(page, bob.email)
    for link in re.findall(
        r"http://testserver(/accounts/confirm-email/\S+)", "".join(m.body for m in mail.outbox)
    ):
        page.post(link)
    alice.refresh_from_db()
    assert alice.email != bob.email


def test_the_export_contains_the_account_and_its_work_but_no_secrets(alice: User, page: Client, work):
    dataset, job = work
    key, secret = api_keys.create(alice, "nightly", ["read"])
    sign_in(page, alice)
    reauthenticate(page, "/account/export/")
    response = page.get("/account/export/")
    content = json.loads(response.content)
    assert content["account"]["email"] == alice.email
    assert [row["dataset_id"] for row in content["datasets"]] == [dataset.dataset_id]
    assert [row["job_id"] for row in content["jobs"]] == [job.job_id]
    assert key.digest not in response.content.decode()
    assert secret not in response.content.decode()
    assert alice.password not in response.content.decode()


def test_the_export_requires_reauthentication(alice: User, page: Client):
    page.force_login(alice)
    assert page.get("/account/export/").headers["Location"].startswith("/accounts/reauthenticate/")


def test_deleting_the_account_requires_typing_the_email_address(alice: User, page: Client, stores):
    sign_in(page, alice)
    reauthenticate(page, "/account/delete/")
    assert page.post("/account/delete/", {"email": "bob@example.com"}).status_code == 400
    assert User.objects.filter(pk=alice.pk).exists()


def test_deleting_the_account_removes_the_user_and_all_their_work(alice: User, page: Client, work):
    from jobs.store import access, outbox

    api_keys.create(alice, "nightly", ["read"])
    other_device = Client()
    sign_in(other_device, alice)
    sign_in(page, alice)
    reauthenticate(page, "/account/delete/")
    page.post("/account/delete/", {"email": alice.email})
    outbox.run("leave", alice.owner_id, alice.owner_id, "")  # what a worker does with the outbox row
    assert not User.objects.filter(pk=alice.pk).exists()
    assert not ApiKey.objects.filter(name="nightly").exists()
    assert not is_signed_in(page)
    assert not is_signed_in(other_device)
    assert not list(access.list_jobs(alice.owner_id))
    assert not list(access.list_datasets(alice.owner_id))
    assert not [row for row in outbox.pending() if row.job_id == f"leave#{alice.owner_id}"]


def test_an_account_with_a_running_job_is_deleted_once_the_job_stops(alice: User, stores):
    from jobs import personal_data
    from jobs.store import access
    from jobs.store.tables import Job, new_id

    job = Job(
        alice.owner_id,
        new_id("ftjob"),
        name="long",
        status="running",
        base="starter",
        fencing_token=1,
        created_at=time.time(),
    )
    job.save()
    personal_data.begin_to_leave(owner=alice.owner_id)
    assert not personal_data.leave(alice.owner_id, alice.owner_id)
    running = access.get_job_for(alice.owner_id, job.job_id)
    assert running.desired == "cancel"
    running.update([Job.status.set("cancelled")])
    assert personal_data.leave(alice.owner_id, alice.owner_id)


@pytest.mark.parametrize(
    ("email", "initials"), [("maria.keller@x.example", "MK"), ("kim@x.example", "KI"), ("é@x.example", "E")]
)
def test_initials_come_from_the_email_address(email: str, initials: str):
    assert User(email=email).initials == initials


def test_an_active_key_stays_listed_after_many_others_were_revoked(alice: User, page: Client):
    api_keys.create(alice, "the old one", ["read"])
    for n in range(2 * api_keys.MAX_KEYS):
        key, _ = api_keys.create(alice, f"later {n}", ["read"])
        api_keys.revoke(alice, key.pk)
    sign_in(page, alice)
    assert "the old one" in page.get("/account/keys/").content.decode()
