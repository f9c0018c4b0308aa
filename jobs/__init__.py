"""The product: datasets, jobs, models, and everything else that uses the trainer."""
