"""Sparse attention in the models of other libraries, each imported only when its functions are called."""
