"""Models: base models to train from, including those added from the Hub, and tuned models."""
