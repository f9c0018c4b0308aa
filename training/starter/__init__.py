"""The bundled tiny GPT-2 model, its sample dataset, and the scripts that created both."""
