"""The trainer: a program of its own that fine-tunes, checks, exports and serves. It knows no Django, queue
or database."""
