"""Lost answers, cancels and fair shares against the real tables; the full numbers run in `bin/bench protocol`."""

from __future__ import annotations

import random
from contextlib import ExitStack
from unittest.mock import patch

import pytest

from tests.faults import cancels, replies
from tests.jobs.lifecycle.planted import PLANTED

pytestmark = pytest.mark.usefixtures("stores")


@pytest.mark.parametrize("kind", replies.KINDS)
def test_a_write_whose_answer_is_lost_is_done_once(kind):
    for number in range(3):
        assert replies.KINDS[kind](random.Random(f"{kind}/{number}")) == []


def test_nothing_of_an_old_holder_is_accepted():
    for number in range(4):
        assert replies.zombie(random.Random(number)) == []


@pytest.mark.parametrize("bug", ["fencing token is not checked", "chunks overwrite"])
def test_an_old_holder_shows_where_a_condition_is_missing(bug):
    with ExitStack() as stack:
        for target, name, new in PLANTED[bug](None):
            stack.enter_context(patch.object(target, name, new))
        assert any(replies.zombie(random.Random(number)) for number in range(3))


def test_losing_answers_shows_who_believes_a_refusal():
    """The planted bug: a failed condition is taken at its word."""
    for target, name, new in PLANTED["replies are believed"](None):
        with patch.object(target, name, new):
            assert any(replies.claim(random.Random(number)) for number in range(3))


@pytest.mark.parametrize("state", cancels.STATES)
def test_a_cancel_of_a_job_nobody_runs_is_at_once_and_for_ever(state):
    for number in range(2):
        assert cancels.cancel(state, random.Random(number)) == []


@pytest.mark.parametrize("slots", [1, 2])
def test_one_who_queued_many_waits_for_one_who_queued_one(settings, slots):
    settings.JOBS = settings.JOBS | {"max_jobs_per_owner": 100}
    assert cancels.turns_until_the_other(slots, count=12) == 0
