"""The inference server: generation requests as JSON lines, and the models it keeps in memory."""
