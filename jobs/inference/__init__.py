"""Text generation: the client, and the worker that runs the inference server."""
