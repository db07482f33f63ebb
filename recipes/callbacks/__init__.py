"""Callbacks and a logger of a training: checkpoints, curves, a schedule of α, and progress on the terminal."""
