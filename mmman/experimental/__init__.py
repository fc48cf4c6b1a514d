"""What no test has passed on the hardware that it is for: CUDA graphs, and simulated clusters."""
