"""The kinds of attention that a recipe can choose, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention
from sparse_attn.nn import SparseMultiheadAttention

ATTENTION_KINDS = ("softmax", "entmax15", "sparsemax", "entmax", "adaptive", "topk")

#: α of the kinds of attention and output whose name fixes α.
NAMED_ALPHA = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}


def attention_factory(
    kind: str, *, alpha: float = 1.5, k: int = 4, length_scaling: bool = False
) -> Callable[..., SparseMultiheadAttention]:
    """A function that takes the arguments of ``nn.MultiheadAttention`` and builds a layer of the given kind.

    Args:
        kind: "softmax", "entmax15", "sparsemax", "entmax" (fixed ``alpha``), "adaptive" (α learnt per head from
            ``alpha``, within [1, 2]) or "topk" (softmax over the ``k`` keys with the largest scores).
        alpha: α of "entmax", initial α of "adaptive".
        k: Number of keys of "topk".
        length_scaling: Whether scores grow with the number of visible keys, by a learnt factor.

    Raises:
        ValueError: ``kind`` is unknown.

    Example:
        >>> attention_factory("entmax15")(16, 4).alpha
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_KINDS)}, got {kind!r}")
    if kind == "topk":
        return partial(TopKMultiheadAttention, k=k, length_scaling=length_scaling)
    return partial(
        AdaptiveSparseMultiheadAttention,
        alpha_init=NAMED_ALPHA.get(kind, alpha),
        learn_alpha=kind == "adaptive",
        length_scaling=length_scaling,
    )
