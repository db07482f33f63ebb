"""What a training does beside learning: checkpoints, curves, and lines or bars on the terminal."""
