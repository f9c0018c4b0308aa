"""The bundled tiny GPT-2, its sample dataset, and the scripts that made both."""
