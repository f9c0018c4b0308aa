"""The trainer: a standalone program that fine-tunes, checks, exports and serves models. It uses neither Django
nor a queue or database."""
