"""The schemas of `/v1`, by subject: OpenAI's fields under OpenAI's names, and ours under `llmtuner`."""
