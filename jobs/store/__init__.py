"""The lowest layer: tables, queue, Redis, object storage, quotas and the outbox. It imports no other package of jobs."""
