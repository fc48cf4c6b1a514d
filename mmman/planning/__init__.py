"""Choose cuts and recomputed units that fit a memory budget, from costs measured on the model."""
