"""How a mapping is computed, never what it means: plain torch today, compiled kernels beside it later."""
