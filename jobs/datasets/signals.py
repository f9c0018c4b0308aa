"""Signals about datasets, for modules above them."""

from __future__ import annotations

from django.dispatch import Signal

# A dataset was checked, read for another base, or deleted: jobs that wait for it may move. Sent with owner, dataset_id.
dataset_settled = Signal()
