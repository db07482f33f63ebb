"""Sparse attention for PyTorch: mappings to sparse probabilities, attention layers that learn how sparse to be.

Beside the names below there are modules of their own:

- ``sparse_attn.optim``: α in training (parameter groups, freezing, setting, annealing, projection, penalty);
- ``sparse_attn.analysis``: what attention heads do, from weights or from a record of a model;
- ``sparse_attn.observe``: how attention modules of your own report their weights to a record;
- ``sparse_attn.viewer``: a record as a page or a picture;
- ``sparse_attn.integrations.huggingface``: sparse attention in models of transformers;
- ``sparse_attn.compat``: names and signatures of other packages.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _runs_the_command() -> bool:
    """Whether this process is the command ``sparse-attn``, whose help should not wait for torch."""
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
