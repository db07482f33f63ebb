"""Statistics of the heads of a model, summed over any number of forward passes in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.analysis.density import full_visible, support_counts
from sparse_attn.analysis.roles import entropy

__all__ = ["AttentionRecord", "HeadStatistics"]


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Statistics of one attention layer; every tensor but the last two has one value per head, on the CPU.

    A query that gives no weight to any key (a fully masked one) does not count.

    Attributes:
        alpha: (H,) α at the last call; None if the layer has no α.
        density: (H,) share of the visible pairs of a query and a key that have a non-zero weight.
        entropy: (H,) mean over the queries of - Σ p log p, in nats.
        support_size: (H,) mean number of keys with a non-zero weight.
        max_weight: (H,) mean of a query's largest weight.
        rows: (H,) number of queries counted.
        weights: (N, H, L, S) of the last call, or (H, L, S) for unbatched input; None unless requested.
        visible: True where a query saw a key under the masks of that call; broadcasts against ``weights``. None without
            ``weights`` or without masks.
    """

    alpha: Tensor | None
    density: Tensor
    entropy: Tensor
    support_size: Tensor
    max_weight: Tensor
    rows: Tensor
    weights: Tensor | None = None
    visible: Tensor | None = None


@dataclass
class _Sums:
    """Sums over the calls of a layer, per head, and the α, weights and visible pairs of the last call."""

    counts: Tensor  # (3, H): queries, pairs with a non-zero weight, visible pairs
    totals: Tensor  # (2, H): sums over queries of the entropy and of the largest weight
    alpha: Tensor | None
    weights: Tensor | None
    visible: Tensor | None


class AttentionRecord(Mapping[str, HeadStatistics]):
    """Layer name -> :class:`HeadStatistics` of the calls so far; prints as a table with a line per head.

    Some layers, such as `SparseAttention`, can be called with different numbers of heads. Calls with another number
    than the first call get a separate entry: ``"name (3 heads)"``.

    Args:
        keep_weights: Whether to keep the weights of each layer's last call.
    """

    def __init__(self, *, keep_weights: bool = False) -> None:
        self._keep_weights = keep_weights
        self._sums: dict[str, _Sums] = {}

    def add(
        self, name: str, weights: Tensor, visible: Tensor | None = None, alpha: float | Tensor | None = None
    ) -> None:
        """Count one call.

        Args:
            name: Name of the layer.
            weights: (N, H, L, S) or (H, L, S).
            visible: True where a query may see a key; broadcasts against ``weights``. None: everywhere.
            alpha: α of the weights, a number or one per head; None if there is no α.
        """
        counts, totals = _sums_of(weights, visible)
        heads = counts.shape[1]
        if name in self._sums and self._sums[name].counts.shape[1] != heads:
            name = f"{name} ({heads} head{'s' * (heads > 1)})"
        before = self._sums.get(name)
        if before is not None:
            counts, totals = before.counts + counts, before.totals + totals
        kept = (weights.detach(), visible) if self._keep_weights else (None, None)
        self._sums[name] = _Sums(counts, totals, _alpha_of_heads(alpha, heads), *kept)

    def __getitem__(self, name: str) -> HeadStatistics:
        sums = self._sums[name]
        rows, used, pairs = sums.counts
        of_entropy, of_maximum = (sums.totals / rows).float()
        return HeadStatistics(
            sums.alpha, used / pairs, of_entropy, used / rows, of_maximum, rows.clone(), sums.weights, sums.visible
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __str__(self) -> str:
        width = max([len("layer"), *map(len, self)])
        lines = [f"{'layer':{width}}  head  alpha  density  entropy  support   max  rows"]
        for name, heads in self.items():
            alphas = ["-"] * len(heads.rows) if heads.alpha is None else [f"{a:.3f}" for a in heads.alpha.tolist()]
            columns = (heads.density, heads.entropy, heads.support_size, heads.max_weight, heads.rows)
            for head, (alpha, *values) in enumerate(zip(alphas, *(c.tolist() for c in columns), strict=True)):
                density, mean, support, maximum, rows = values
                lines.append(
                    f"{name:{width}}  {head:4}  {alpha:>5}  {density:7.3f}  {mean:7.3f}  {support:7.2f}"
                    f"  {maximum:.2f}  {rows:4}"
                )
        return "\n".join(lines)


# Computed outside inference mode, since later passes could not update sums that are inference tensors.
@torch.inference_mode(False)
@torch.no_grad()
def _sums_of(weights: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = weights.detach().float() if weights.dtype != torch.float64 else weights.detach()
    pairs = full_visible(weights, visible)
    counted = (weights != 0).any(-1)
    over = [dim for dim in range(counted.dim()) if dim != counted.dim() - 2]
    counts = torch.stack([counted.sum(over), *support_counts(weights, pairs & counted.unsqueeze(-1))])
    # Without keys there is no maximum, and no query counts.
    per_query = (entropy(weights), weights.amax(-1)) if weights.shape[-1] else (weights.sum(-1),) * 2
    totals = torch.stack([values.sum(over) for values in per_query])
    return counts.cpu(), totals.cpu().double()


def _alpha_of_heads(alpha: object, heads: int) -> Tensor | None:
    if isinstance(alpha, Tensor) and alpha.numel() in (1, heads):
        return alpha.detach().flatten().float().cpu().expand(heads).clone()
    return torch.full((heads,), float(alpha)) if isinstance(alpha, (int, float)) else None
