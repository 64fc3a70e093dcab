"""The loop, once, with its checkpoints, logs and optimiser."""
