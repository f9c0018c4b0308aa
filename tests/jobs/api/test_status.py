"""Each status of a job has one of OpenAI's names in the API, and the schema lists no other."""

from __future__ import annotations

from typing import get_args

from jobs.api.fine_tuning import STATUS
from jobs.api.schemas import ApiStatus
from jobs.store.states import JobStatus


def test_every_status_has_a_name_in_the_schema():
    assert set(STATUS) == set(JobStatus)
    assert set(STATUS.values()) == set(get_args(ApiStatus))
