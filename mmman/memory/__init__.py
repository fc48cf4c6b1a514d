"""Reduce the memory of training: recompute units in the backward pass, and run parts of the model on a few images at a time."""
