"""Sequence to sequence: words to pronunciations, or any pairs of texts."""
