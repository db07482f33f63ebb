from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_attn.analysis import HeadStatistics


def expected_statistics(passes: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Density, entropy, support size, largest weight and number of rows of each head, by loops over single rows."""
    heads = passes[0][0].shape[1]
    found: dict[str, list[float]] = {name: [] for name in ("density", "entropy", "support_size", "max_weight", "rows")}
    for head in range(heads):
        rows = [
            [weight for weight, seen in zip(row.tolist(), see.tolist(), strict=True) if seen]
            for weights, visible in passes
            for row, see in zip(
                weights[:, head].flatten(0, 1), visible.expand(weights.shape)[:, head].flatten(0, 1), strict=True
            )
        ]
        rows = [row for row in rows if any(row)]
        supports = [sum(weight > 0 for weight in row) for row in rows]
        found["density"].append(sum(supports) / sum(map(len, rows)))
        found["entropy"].append(sum(-w * math.log(w) for row in rows for w in row if w > 0) / len(rows))
        found["support_size"].append(sum(supports) / len(rows))
        found["max_weight"].append(sum(map(max, rows)) / len(rows))
        found["rows"].append(len(rows))
    return found


def assert_statistics(heads: HeadStatistics, passes: list[tuple[Tensor, Tensor]]) -> None:
    for name, values in expected_statistics(passes).items():
        torch.testing.assert_close(getattr(heads, name).double(), torch.tensor(values).double(), rtol=1e-5, atol=1e-6)


@pytest.fixture(name="assert_statistics")
def of_passes() -> Callable[[HeadStatistics, list[tuple[Tensor, Tensor]]], None]:
    """Compares head statistics with those computed from the weights and visible pairs of all passes."""
    return assert_statistics
