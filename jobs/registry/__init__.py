"""Models: base models to train from, models imported from the Hub, and tuned models with their versions."""
