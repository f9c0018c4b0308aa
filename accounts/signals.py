"""Signals that tell other apps about changes to users, so that accounts need not import those apps."""

from __future__ import annotations

from django.dispatch import Signal

# Sent when a user exports their data. A receiver(owner) returns {section: content}, with plain values only.
exporting = Signal()
# Sent when a user deletes their account. A receiver(owner) deletes all of its data, and may be called again after a crash.
leaving = Signal()
