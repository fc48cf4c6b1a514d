"""The same training in less memory: units recomputed in the backward pass, and parts that run on a few images at a time."""
