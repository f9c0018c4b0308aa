"""What lower modules need to know about the lease on a job: every write of an attempt carries its fencing token."""

from __future__ import annotations

from typing import Protocol


class LostRace(Exception):
    """Another process was first, or the lease is lost. The caller must stop writing."""


class Lease(Protocol):
    @property
    def job_id(self) -> str: ...
    @property
    def fencing_token(self) -> int: ...
    @property
    def lease_owner(self) -> str: ...
