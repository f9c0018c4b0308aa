"""Staff can see and cancel the jobs of all users in Django's admin."""

from __future__ import annotations

from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.store import access, tables
from jobs.store.tables import Audit, JobIndex, month_of
from tests.factories import browser_of, make_user
from tests.jobs.views.makers import make_job

LIST = "admin:jobs_overseenjob_changelist"


def test_staff_find_a_job_by_time_state_id_and_user(sams: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "failed", name="Findable")
    JobIndex(f"failed#{month_of(job.created_at)}", job.job_id, owner=job.owner, name=job.name).save()
    for query in ({}, {"state": "failed"}, {"q": job.job_id}, {"q": alice.email}, {"q": alice.owner_id}):
        text = sams.get(reverse(LIST), query).content.decode()
        assert "Findable" in text, query
        assert alice.email in text
    assert "Findable" not in sams.get(reverse(LIST), {"state": "succeeded"}).content.decode()
    assert "Findable" not in sams.get(reverse(LIST), {"month": "2020-01"}).content.decode()


def test_the_admin_index_links_to_the_jobs(sams: Client) -> None:
    assert reverse(LIST) in sams.get(reverse("admin:index")).content.decode()


def test_staff_can_read_the_log_and_cancel_and_this_is_audited(sams: Client, sam: User, alice: User) -> None:
    job = make_job(alice.owner_id, "queued", lines=[{"t": "log", "level": "info", "message": "hello staff"}])
    detail = reverse("admin:jobs_overseenjob_detail", args=[job.owner, job.job_id])
    assert "hello staff" in sams.get(detail).content.decode()
    sams.post(reverse("admin:jobs_overseenjob_cancel", args=[job.owner, job.job_id]))
    assert access.get_job_for(alice.owner_id, job.job_id).status == "cancelled"
    audit = [row for row in tables.rows(Audit, month_of(job.created_at)) if row.target == job.job_id]
    assert [(row.actor, row.action) for row in audit] == [(sam.owner_id, "cancel")]


def test_staff_can_raise_the_priority_of_a_job(sams: Client, alice: User) -> None:
    job = make_job(alice.owner_id, "queued")
    url = reverse("admin:jobs_overseenjob_priority", args=[job.owner, job.job_id])
    sams.post(url, {"priority": "10"})
    assert access.get_job_for(alice.owner_id, job.job_id).priority == 10
    sams.post(url, {"priority": "999"})
    assert access.get_job_for(alice.owner_id, job.job_id).priority == 10
    audit = [row for row in tables.rows(Audit, month_of(job.created_at)) if row.target == job.job_id]
    assert [row.action for row in audit] == ["priority 10"]


def test_customers_have_no_access(bobs: Client, alice: User) -> None:
    job = make_job(alice.owner_id)
    for url in (reverse(LIST), reverse("admin:jobs_overseenjob_detail", args=[job.owner, job.job_id])):
        assert bobs.get(url).status_code in (302, 403, 404)
    bobs.post(reverse("admin:jobs_overseenjob_cancel", args=[job.owner, job.job_id]))
    bobs.post(reverse("admin:jobs_overseenjob_priority", args=[job.owner, job.job_id]), {"priority": "10"})
    assert access.get_job_for(alice.owner_id, job.job_id).priority == 0
    assert access.get_job_for(alice.owner_id, job.job_id).desired == "run"


def test_staff_without_the_permission_have_no_access(db: None, alice: User) -> None:
    assert browser_of(make_user("guest", is_staff=True)).get(reverse(LIST)).status_code == 403


def test_invalid_queries_are_404_or_empty(sams: Client) -> None:
    assert sams.get(reverse(LIST), {"state": "void#x"}).status_code == 404
    assert sams.get(reverse(LIST), {"month": "2026-13"}).status_code == 404
    assert "No results" in sams.get(reverse(LIST), {"q": "ftjob-<script>"}).content.decode()
    too_large = "ftjob-" + "8" * 26  # made of a ULID's letters, but over 128 bits
    assert "No results" in sams.get(reverse(LIST), {"q": too_large}).content.decode()
