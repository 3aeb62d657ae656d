"""Checkpoints: where weights are read from, lazily, and where results are written to, atomically."""
