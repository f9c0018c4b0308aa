"""The page that shows how accurate recent estimates were."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import estimates
from tests.jobs.views.makers import make_estimate_record

PAGE = reverse("jobs:estimates")


def test_the_page_counts_the_estimates_that_held_and_lists_each(alices: Client, alice: User) -> None:
    for number, actual in enumerate((90, 110, 150)):
        make_estimate_record(alice.owner_id, actual, number, name=f"Orders {number}")
    response = alices.get(PAGE)
    assert "2 of 3 jobs finished within the P90 estimate" in response.content.decode()
    assert [row["name"] for row in response.context["rows"]] == ["Orders 2", "Orders 1", "Orders 0"]
    points = response.context["chart"]["jobs"]
    assert [point["held"] for point in points] == [False, True, True], "the newest on the left"
    assert 0 < points[0]["y"] < points[1]["y"] < points[2]["p50"] < points[2]["y"], "longer is higher"


def test_the_page_lists_at_most_fifty_estimates(alices: Client, alice: User) -> None:
    for number in range(55):
        make_estimate_record(alice.owner_id, 100, number)
    assert len(alices.get(PAGE).context["rows"]) == 50


def test_an_empty_page_explains_what_will_appear(alices: Client) -> None:
    assert "No finished jobs yet" in alices.get(PAGE).content.decode()


def test_bob_does_not_see_alices_estimates(bobs: Client, alice: User) -> None:
    job_id = make_estimate_record(alice.owner_id, 100, name="Secret orders")
    page = bobs.get(PAGE).content.decode()
    assert job_id not in page
    assert "Secret orders" not in page


@pytest.mark.parametrize(("browser_fixture", "status"), [("alices", 404), ("sams", 200)])
def test_only_staff_see_the_estimates_of_all_jobs(
    browser_fixture: str, status: int, request: pytest.FixtureRequest
) -> None:
    browser: Client = request.getfixturevalue(browser_fixture)
    job_id = make_estimate_record(estimates.kind_of(estimates.machine()), 100)
    response = browser.get(PAGE, {"of": "all"})
    assert response.status_code == status
    if status == 200:
        assert job_id in response.content.decode()
