"""Signals about datasets, for modules above them."""

from __future__ import annotations

from django.dispatch import Signal

# A dataset was checked, checked for another base, or deleted, so jobs that wait for it may proceed. Sent with owner and
# dataset_id.
dataset_settled = Signal()
