"""Sparse attention in the models of other libraries. A library is imported only when a function needs it."""
