"""Callbacks of a training: checkpoints, curves, and progress on the terminal."""
