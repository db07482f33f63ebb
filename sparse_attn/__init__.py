"""Sparse attention for PyTorch: mappings from scores to sparse probabilities, and layers with learnt sparsity.

The package exports the names of ``sparse_attn.public``. Further modules are:

- ``sparse_attn.optim``: α in training (parameter groups, freezing, setting, annealing, projection, penalty);
- ``sparse_attn.analysis``: statistics and roles of attention heads, from weights or from a record of a model;
- ``sparse_attn.observe``: functions by which your own attention modules report their weights to a record;
- ``sparse_attn.viewer``: a page or a picture of recorded attention;
- ``sparse_attn.integrations.huggingface``: sparse attention in models of transformers;
- ``sparse_attn.compat``: names and signatures of other packages.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _runs_the_command() -> bool:
    """Whether this process runs the command ``sparse-attn``, whose help should not wait for the import of torch."""
    return bool(sys.argv[:1]) and Path(sys.argv[0]).stem == "sparse-attn"


if not TYPE_CHECKING and _runs_the_command():

    def __getattr__(name: str) -> Any:
        public = importlib.import_module("sparse_attn.public")
        try:
            return getattr(public, name)
        except AttributeError:
            raise AttributeError(f"module 'sparse_attn' has no attribute {name!r}") from None

else:
    from sparse_attn.public import *  # noqa: F403
    from sparse_attn.public import __all__ as __all__
