"""Generating text with models: the client, and the worker that runs the inference server."""
