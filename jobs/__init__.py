"""The product: datasets, jobs, models and everything around them, on top of the trainer."""
