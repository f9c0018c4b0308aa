"""Signals about datasets, for packages that the datasets package must not import."""

from __future__ import annotations

from django.dispatch import Signal

# Sent when a dataset was checked, checked for another base, or deleted, so that jobs that wait for it can proceed. The
# arguments are owner and dataset_id.
dataset_settled = Signal()
