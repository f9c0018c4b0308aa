"""The page that shows how the last estimates did."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import estimates
from tests.jobs.views.makers import make_record

PAGE = reverse("jobs:estimates")


def test_it_says_how_many_held_and_shows_each(alices: Client, alice: User) -> None:
    for number, actual in enumerate((90, 110, 150)):
        make_record(alice.owner_id, actual, number, name=f"Orders {number}")
    answer = alices.get(PAGE)
    assert "2 of 3 jobs finished within the P90 estimate" in answer.content.decode()
    assert [row["name"] for row in answer.context["rows"]] == ["Orders 2", "Orders 1", "Orders 0"]
    dots = answer.context["chart"]["jobs"]
    assert [dot["held"] for dot in dots] == [False, True, True], "the newest on the left"
    assert 0 < dots[0]["y"] < dots[1]["y"] < dots[2]["p50"] < dots[2]["y"], "longer is higher"


def test_it_shows_no_more_than_fifty(alices: Client, alice: User) -> None:
    for number in range(55):
        make_record(alice.owner_id, 100, number)
    assert len(alices.get(PAGE).context["rows"]) == 50


def test_who_has_none_is_told_what_will_stand_there(alices: Client) -> None:
    assert "No finished jobs yet" in alices.get(PAGE).content.decode()


def test_bob_does_not_see_alices(bobs: Client, alice: User) -> None:
    job_id = make_record(alice.owner_id, 100, name="Secret orders")
    page = bobs.get(PAGE).content.decode()
    assert job_id not in page
    assert "Secret orders" not in page


@pytest.mark.parametrize(("who", "status"), [("alices", 404), ("sams", 200)])
def test_all_jobs_are_for_staff(who: str, status: int, request: pytest.FixtureRequest) -> None:
    browser: Client = request.getfixturevalue(who)
    job_id = make_record(estimates.kind_of(estimates.machine()), 100)
    answer = browser.get(PAGE, {"of": "all"})
    assert answer.status_code == status
    if status == 200:
        assert job_id in answer.content.decode()
