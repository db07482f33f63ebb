"""Word alignments from cross-attention."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from sparse_attn.checks import check_floating

__all__ = ["AlignmentRule", "align"]

#: How many heads must give a pair weight; see :func:`align`.
AlignmentRule = Literal["any", "most", "all", "best"]


def align(weights: Tensor, rule: AlignmentRule = "most") -> Tensor:
    """Aligned pairs of a query and a key, computed from the weights of all heads.

    Weights with exact zeros need no threshold: a head aligns a query with every key of non-zero weight. Softmax gives
    every key some weight, so only the rule "best" is useful for softmax.

    Args:
        weights: (..., H, L, S), without keys that are not words, such as the end of the sequence.
        rule: "any": at least one head gives the pair weight; "most": more than half of the heads; "all": every head;
            "best": the key has the query's largest mean weight over heads. Only one key of a query is aligned, and no
            key if all weights of the query are zero.

    Returns:
        (..., L, S) bool.

    Raises:
        TypeError: if `weights` is not a floating tensor.
        ValueError: if there is no head, or the rule is unknown.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[[0.8, 0.2, 0.0]], [[0.6, 0.0, 0.4]], [[0.1, 0.9, 0.0]]])
        >>> {rule: align(weights, rule).int().tolist() for rule in ("any", "most", "all", "best")}
        {'any': [[1, 1, 1]], 'most': [[1, 1, 0]], 'all': [[1, 0, 0]], 'best': [[1, 0, 0]]}
    """
    check_floating(weights, "weights")
    if weights.dim() < 3 or not weights.shape[-3]:
        raise ValueError(f"weights must be (..., H, L, S) with a head or more, got {tuple(weights.shape)}")
    used = weights != 0
    if rule == "any":
        return used.any(-3)
    if rule == "all":
        return used.all(-3)
    if rule == "most":
        return used.sum(-3) * 2 > weights.shape[-3]
    if rule == "best":
        mean = weights.mean(-3)
        best = mean.new_zeros(mean.shape).bool()
        if mean.shape[-1]:
            best.scatter_(-1, mean.argmax(-1, keepdim=True), True)
        return best & (mean != 0)
    raise ValueError(f"rule must be one of {', '.join(get_args(AlignmentRule))}, got {rule!r}")
