"""The lowest layer: tables, queue, Redis, object storage, quotas and the outbox. It imports nothing above it."""
