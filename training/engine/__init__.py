"""One training run: the loop and what it is made of, from packing and the optimizer to checkpoints."""
