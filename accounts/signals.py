"""Signals by which other apps learn about users, so that accounts need not import them."""

from __future__ import annotations

from django.dispatch import Signal

# A user exports their data: a receiver(owner) returns {section: content}, with plain values only.
exporting = Signal()
# A user deletes their account: a receiver(owner) deletes all of its data, and may be called again after a crash.
leaving = Signal()
