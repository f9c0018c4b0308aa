"""Checking a dataset before training: findings, the report, and fixing what it found. No torch."""
