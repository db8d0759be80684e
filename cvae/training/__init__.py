"""How weights change: the optimizer, the average of the weights, a phase and its schedule, the CUDA graph."""
