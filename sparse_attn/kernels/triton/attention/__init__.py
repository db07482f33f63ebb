"""Fused attention in Triton: forward, backward and decoding, with the tiles, plans and dropout they share."""
