"""Training: configuration, loss, optimizer, checkpoints, resume."""
