"""The program ``sparse-attn``: training, evaluation, comparison, inspection and calibration of sparse attention."""
