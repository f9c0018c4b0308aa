"""Turns rows into tokens: tokenizer, chat template and loss mask. Imports no torch."""
