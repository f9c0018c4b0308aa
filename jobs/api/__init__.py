"""The `/v1` API, one module per group of endpoints."""
