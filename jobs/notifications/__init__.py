"""Notifies users by webhook and email, and decides which addresses webhooks may be sent to."""
