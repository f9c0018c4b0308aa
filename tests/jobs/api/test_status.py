"""Each status of a job has one of OpenAI's names in the API, and the schema lists no other."""

from __future__ import annotations

from typing import get_args

from jobs.api.fine_tuning import _shown_status
from jobs.api.schemas.fine_tuning import ShownStatus
from jobs.store.states import JobStatus


def test_every_status_has_a_name_in_the_schema() -> None:
    assert {_shown_status(status) for status in JobStatus} == set(get_args(ShownStatus))
