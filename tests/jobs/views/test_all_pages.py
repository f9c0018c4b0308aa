"""Tests that go over all pages list them by hand. A new page of `jobs/urls.py` that one of them leaves out fails here."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import resolve, reverse

from accounts.models import User
from jobs.urls import urlpatterns
from tests.browser.test_pages import make_pages
from tests.jobs.views.test_escaping import pages
from tests.journeys.test_reads import MAX_READS

# Addresses that answer GET and are no whole page, or that a test leaves out.
FILES = {"download_model", "job_csv", "job_log", "object"}
PARTS = {"dataset_report", "job_actions", "job_live"}  # of pages that are listed
# files, and forms that read what new_job and dataset_rows do
READS_UNLIMITED = {"download_model", "object", "edit_job", "edit_row"}


@pytest.fixture
def names(alices: Client) -> set[str]:
    """The names of all addresses that answer GET; the others take only POST."""
    result = set()
    for pattern in urlpatterns:
        values = {name: 1 if name == "number" else "x" for name in pattern.pattern.converters}
        if alices.get(reverse(f"jobs:{pattern.name}", kwargs=values)).status_code != 405:
            result.add(str(pattern.name))
    return result


def test_every_page_has_a_limit_of_reads(names: set[str]) -> None:
    assert names == set(MAX_READS) | READS_UNLIMITED


def test_every_page_is_opened_in_the_browser(names: set[str], alice: User) -> None:
    assert names == {resolve(address).url_name for address in make_pages(alice.owner_id)} | FILES | PARTS


def test_every_page_is_searched_for_unescaped_text(names: set[str], alices: Client, alice: User) -> None:
    listed = {key.split()[0] for key in pages(alices, alice, "harmless")} - {"live"}
    assert names == listed | FILES | PARTS
