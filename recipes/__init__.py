"""Training, evaluation and inspection of sparse-attention models on real data."""
