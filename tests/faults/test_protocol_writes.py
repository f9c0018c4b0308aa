"""Lost responses, cancellations and fair share against real tables; `bin/bench protocol` runs larger numbers."""

from __future__ import annotations

import random
from contextlib import ExitStack
from unittest.mock import patch

import pytest

from tests.faults import cancels, lost_responses
from tests.jobs.lifecycle.planted import PLANTED

pytestmark = pytest.mark.usefixtures("stores")


@pytest.mark.parametrize("kind", lost_responses.KINDS)
def test_a_write_whose_response_is_lost_is_applied_once(kind):
    for number in range(3):
        assert lost_responses.KINDS[kind](random.Random(f"{kind}/{number}")) == []


def test_all_writes_of_a_stale_worker_are_rejected():
    for number in range(4):
        assert lost_responses.stale_worker(random.Random(number)) == []


@pytest.mark.parametrize("bug", ["fencing token is not checked", "chunks overwrite"])
def test_writes_of_a_stale_worker_reveal_a_missing_condition(bug):
    with ExitStack() as stack:
        for target, name, new in PLANTED[bug](None):
            stack.enter_context(patch.object(target, name, new))
        assert any(lost_responses.stale_worker(random.Random(number)) for number in range(3))


def test_lost_responses_reveal_code_that_trusts_a_failed_condition():
    """The planted bug: a failed condition always counts as a lost race, even after the write was applied."""
    for target, name, new in PLANTED["replies are believed"](None):
        with patch.object(target, name, new):
            assert any(lost_responses.claim(random.Random(number)) for number in range(3))


@pytest.mark.parametrize("state", cancels.STATES)
def test_a_job_that_no_worker_runs_is_cancelled_at_once_and_permanently(state):
    for number in range(2):
        assert cancels.cancel(state, random.Random(number)) == []


@pytest.mark.parametrize("slots", [1, 2])
def test_a_user_with_one_job_is_served_before_a_user_with_many(settings, slots):
    settings.JOBS = settings.JOBS | {"max_jobs_per_owner": 100}
    assert cancels.jobs_started_before_other_user(slots, count=12) == 0
