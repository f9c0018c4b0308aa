"""How the rest of the studio hears about people, without accounts knowing of it."""

from __future__ import annotations

from django.dispatch import Signal

# Somebody takes their data: a receiver(owner) answers with {section: content}, plain values only.
exporting = Signal()
# Somebody leaves: a receiver(owner) removes all it holds of them, and may be called again after a crash.
leaving = Signal()
