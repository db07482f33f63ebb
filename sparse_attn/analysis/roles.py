"""Roles of a head: the spread of its weights, their relative position, and whether it scans its keys in order.

Each statistic has one value per query (or per sequence), or NaN where it is not defined, so that averages over a data
set of many batches are exact; `mean_per_head` averages one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_attn.analysis.density import full_visible
from sparse_attn.checks import check_int

__all__ = [
    "ROLE_THRESHOLDS",
    "entropy",
    "mean_per_head",
    "monotonicity",
    "name_roles",
    "offset_weight",
    "strongest_at_offset",
]

#: For each role of :func:`name_roles`, the smallest share with which a head has the role.
ROLE_THRESHOLDS = {"previous": 0.5, "self": 0.5, "next": 0.5, "monotone": 0.8, "diffuse": 0.9}


def mean_per_head(values: Tensor) -> Tensor:
    """Average of a statistic per head, over the sequences and queries for which it is defined.

    Args:
        values: (N, H, L) or (H, L), as the statistics of this module give them; NaN marks "no value".

    Returns:
        (H,), floating; NaN for a head without any value.

    Raises:
        TypeError: if `values` is not a tensor.
        ValueError: if `values` has another number of dimensions.

    Example:
        >>> mean_per_head(torch.tensor([[0.5, 1.0, float("nan")], [0.0, 0.0, 3.0]]))
        tensor([0.7500, 1.0000])
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}")
    if values.dim() not in (2, 3):
        raise ValueError(f"values must have the shape (N, H, L) or (H, L), got {tuple(values.shape)}")
    # In float32: float16 cannot hold the sum over many queries.
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    mean = wide.nanmean(dim=[dim for dim in range(values.dim()) if dim != values.dim() - 2])
    return mean.to(values.dtype) if values.is_floating_point() else mean


def entropy(weights: Tensor, visible: Tensor | None = None, *, relative: bool = False) -> Tensor:
    """Shannon entropy of each query's weights, - Σ p log p, in nats.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.
        relative: divide by log S, the entropy of equal weights on all S visible keys of the query.

    Returns:
        (N, H, L) or (H, L), from 0 (one key) to log S (equal weights), or to 1 if relative. NaN for a query
        with no visible key; if relative, also for a query with only one visible key.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> entropy(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
        tensor([[0.0000, 0.6931]])
    """
    pairs = full_visible(weights, visible)
    terms: Tensor = torch.special.entr(weights)
    per_query = terms.masked_fill(~pairs, 0.0).sum(dim=-1)
    visible_keys = pairs.sum(dim=-1)
    if relative:
        return (per_query / visible_keys.log()).masked_fill(visible_keys < 2, torch.nan)
    return per_query.masked_fill(visible_keys < 1, torch.nan)


def offset_weight(weights: Tensor, offset: int, visible: Tensor | None = None) -> Tensor:
    """Weight that each query gives to the key at its own position plus `offset`, in self-attention.

    Averaged over a data set this is the confidence of a positional head.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        offset: -1 is the previous position, 0 the query's own, 1 the next.
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        (N, H, L) or (H, L); NaN for a query that does not see that position.

    Raises:
        TypeError: if `weights` is not floating point, `offset` not an int or `visible` not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> offset_weight(torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]), offset=-1)
        tensor([[   nan, 0.7500]])

    Reference:
        Correia, Niculae & Martins 2019, "Adaptively Sparse Transformers", section 5.2.
    """
    check_int(offset, "offset")
    pairs = full_visible(weights, visible)
    if not weights.shape[-1]:
        return weights.new_full(weights.shape[:-1], torch.nan)
    keys = torch.arange(weights.shape[-2], device=weights.device) + offset
    inside = (keys >= 0) & (keys < weights.shape[-1])
    index = keys.clamp(0, weights.shape[-1] - 1).expand(weights.shape[:-1]).unsqueeze(-1)
    seen = pairs.gather(-1, index).squeeze(-1) & inside
    return weights.gather(-1, index).squeeze(-1).masked_fill(~seen, torch.nan)


def strongest_at_offset(weights: Tensor, offset: int, visible: Tensor | None = None) -> Tensor:
    """Whether the key at the query's own position plus `offset` gets the largest weight (1) or not (0).

    Voita et al. call a head positional when this holds for at least 90 % of the queries.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        offset: -1 is the previous position, 0 the query's own, 1 the next.
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        (N, H, L) or (H, L); a tie for the largest weight gives 1; NaN for a query that does not see that
        position.

    Raises:
        TypeError: if `weights` is not floating point, `offset` not an int or `visible` not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> strongest_at_offset(torch.tensor([[[0.6, 0.4], [0.75, 0.25]]]), offset=0)
        tensor([[1., 0.]])

    Reference:
        Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5.1.
    """
    there = offset_weight(weights, offset, visible)
    if not weights.shape[-1]:
        return there
    largest = weights.masked_fill(~full_visible(weights, visible), -torch.inf).amax(dim=-1)
    return (there == largest).to(weights.dtype).masked_fill(there.isnan(), torch.nan)


def monotonicity(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Correlation of key positions with query positions: how steadily a head moves forward over its keys.

    Pearson's correlation, within one sequence, of the query's position l and the mean position of its
    weights, c_l = Σ_s p_ls s / Σ_s p_ls: 1 for a head that scans the keys in order, 0 for a head whose mean
    position does not depend on the query.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        (N, H, 1) or (H, 1), one value per sequence, -1 to 1; 0 if the mean position never moves; NaN with fewer
        than two queries that give weight to a visible key.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> monotonicity(torch.eye(4).unsqueeze(0))
        tensor([[1.]])
    """
    pairs = full_visible(weights, visible)
    used = torch.where(pairs, weights, 0.0).to(torch.promote_types(weights.dtype, torch.float32))
    key_positions = torch.arange(weights.shape[-1], dtype=used.dtype, device=used.device)
    query_positions = torch.arange(weights.shape[-2], dtype=used.dtype, device=used.device)
    mass = used.sum(dim=-1)
    real = mass > 0
    count = real.sum(dim=-1, keepdim=True)
    with torch.autocast(used.device.type, enabled=False):  # bfloat16 has no positions between 256 and 258
        centre = (used @ key_positions) / mass.where(real, 1.0)

    def deviation(x: Tensor) -> Tensor:
        mean = (x * real).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        return (x - mean) * real

    dx, dy = deviation(query_positions.expand_as(centre)), deviation(centre)
    # Deviations of up to 1e-4 can be rounding errors, and count as no movement.
    moves: Tensor = (dy.abs() > 1e-4).any(dim=-1, keepdim=True)
    spread = (dx.norm(dim=-1, keepdim=True) * dy.norm(dim=-1, keepdim=True)).where(moves, 1.0)
    correlation: Tensor = ((dx * dy).sum(dim=-1, keepdim=True) / spread).where(moves, 0.0)
    return correlation.masked_fill(count < 2, torch.nan).to(weights.dtype)


def name_roles(shares: Mapping[str, Tensor], thresholds: Mapping[str, float] = ROLE_THRESHOLDS) -> list[str]:
    """The name of each head's strongest role, if it reaches the threshold of the role.

    With the default thresholds a head is "previous", "self" or "next" if at least half of its weight is on
    that position, "monotone" if it scans its keys in order, and "diffuse" if its weights are almost equal.

    Args:
        shares: for each role, the share of each head, (H,), 1 at most: the mean `offset_weight` for
            "previous", "self" and "next", `monotonicity` for "monotone", relative `entropy` for "diffuse".
            NaN counts as 0.
        thresholds: the smallest share of each role.

    Returns:
        A name for every head: the role whose share is the largest multiple of its threshold, or "mixed" if no
        share reaches its threshold.

    Raises:
        TypeError: if a share is not a tensor.
        ValueError: if there is no share at all, a role has no threshold, or shares differ in their shapes.

    Example:
        >>> name_roles({"previous": torch.tensor([0.97, 0.1]), "next": torch.tensor([0.01, 0.4])})
        ['previous', 'mixed']
    """
    if not shares or not shares.keys() <= thresholds.keys():
        roles, got = ", ".join(thresholds), ", ".join(shares) or "none"
        raise ValueError(f"shares must be of the roles {roles}, got {got}")
    names = list(shares)
    for name, share in shares.items():
        if not isinstance(share, Tensor):
            raise TypeError(f"shares must be tensors (H,), got {type(share).__name__} for {name!r}")
        if share.shape != shares[names[0]].shape:
            shapes = ", ".join(str(tuple(each.shape)) for each in shares.values())
            raise ValueError(f"shares must all have the same shape (H,), got {shapes}")
    ratios = torch.stack([shares[name].nan_to_num(0.0) / thresholds[name] for name in names])
    largest, index = ratios.max(dim=0)
    named = zip((largest >= 1).tolist(), index.tolist(), strict=True)
    return [names[best] if reached else "mixed" for reached, best in named]
