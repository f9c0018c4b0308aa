"""The lease on a job, as the lower modules know it: whoever writes for an attempt shows its fencing token."""

from __future__ import annotations

from typing import Protocol


class LostRace(Exception):
    """Another process was first, or the lease is lost: write nothing more."""


class Lease(Protocol):
    @property
    def job_id(self) -> str: ...
    @property
    def fencing_token(self) -> int: ...
    @property
    def lease_owner(self) -> str: ...
