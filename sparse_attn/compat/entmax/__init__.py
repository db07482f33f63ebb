"""The names of the entmax package (1.3), computed by our operators.

Replace ``entmax`` by ``sparse_attn.compat.entmax`` in the imports. The package's modules ``activations``,
``root_finding`` and ``losses`` exist here too. The results differ only where the package's results are inexact or
wrong, for example: masked rows, half precision, large scores, α = 1. The arguments ``k``, ``n_iter`` and
``ensure_sum_one``, which tune the package's algorithms, are accepted and have no effect.
"""

from sparse_attn.compat.entmax.activations import Entmax15, Sparsemax, entmax15, sparsemax
from sparse_attn.compat.entmax.losses import (
    Entmax15Loss,
    EntmaxBisectLoss,
    NormmaxBisectLoss,
    SparsemaxBisectLoss,
    SparsemaxLoss,
    entmax15_loss,
    entmax_bisect_loss,
    normmax_bisect_loss,
    sparsemax_bisect_loss,
    sparsemax_loss,
)
from sparse_attn.compat.entmax.root_finding import (
    BudgetBisect,
    EntmaxBisect,
    NormmaxBisect,
    SparsemaxBisect,
    budget_bisect,
    entmax_bisect,
    normmax_bisect,
    sparsemax_bisect,
)

__all__ = [
    "BudgetBisect",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxBisect",
    "EntmaxBisectLoss",
    "NormmaxBisect",
    "NormmaxBisectLoss",
    "Sparsemax",
    "SparsemaxBisect",
    "SparsemaxBisectLoss",
    "SparsemaxLoss",
    "budget_bisect",
    "entmax15",
    "entmax15_loss",
    "entmax_bisect",
    "entmax_bisect_loss",
    "normmax_bisect",
    "normmax_bisect_loss",
    "sparsemax",
    "sparsemax_bisect",
    "sparsemax_bisect_loss",
    "sparsemax_loss",
]
