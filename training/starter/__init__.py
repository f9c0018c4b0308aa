"""The bundled tiny GPT-2, its sample task, and the scripts that made both."""
