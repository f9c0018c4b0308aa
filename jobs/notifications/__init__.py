"""Telling users what happened: webhooks, and the addresses they may be sent to."""
