"""Check that attention gives the same results if padding holds zeros or another number, NaN by default."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ALPHAS = torch.tensor([1.0, 1.3, 2.0])


def padding_mask(keys: int, side: str, kind: str, device: torch.device) -> Tensor:
    """A mask (2, 1, 1, S) that hides a third of the keys of the second batch entry, at the left or right end."""
    key = torch.arange(keys, device=device)
    first = key < keys - keys // 3 if side == "right" else key >= keys // 3
    seen = torch.stack([torch.ones_like(first), first]).view(2, 1, 1, keys)
    return seen if kind == "boolean" else torch.zeros(seen.shape, device=device).masked_fill(~seen, -math.inf)


def assert_padding_is_ignored(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    queries: int,
    keys: int,
    device: torch.device,
    *,
    heads: int = 3,
    groups: int = 1,
    fill: float = math.nan,
) -> None:
    """Check that outputs, with and without autograd, and gradients are equal if padding holds zeros or ``fill``."""
    for side, kind in (("right", "boolean"), ("left", "float")):
        mask = padding_mask(keys, side, kind, device)
        hidden = ~(mask == (kind == "boolean")).transpose(-2, -1)
        query = torch.randn(2, heads, queries, 11, device=device)
        key, value = torch.randn(2, 2, heads // groups, keys, 11, device=device)
        upstream = torch.randn_like(query)
        results = []
        for number in (0.0, fill):
            inputs = [query.clone(), key.masked_fill(hidden, number), value.masked_fill(hidden, number)]
            inference = attend(*inputs, mask)
            for x in inputs:
                x.requires_grad_()
            output = attend(*inputs, mask)
            results.append((inference, output, *torch.autograd.grad(output, inputs, upstream)))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected)
