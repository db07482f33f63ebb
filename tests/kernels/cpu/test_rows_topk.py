"""The row kernels in C over only the k largest scores of each row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from c_rows import LOWEST, SIZES, naive_topk, needs_library

from sparse_attn.kernels.cpu import rows

pytestmark = needs_library


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 0.3, 2.0])
def test_top_k_equals_a_naive_implementation(a, variant):
    for size, dtype in itertools.product(SIZES, [torch.float32, torch.float64]):
        x = torch.randn(4, size, dtype=dtype)
        x[1] = x[1].round()  # ties
        x[2] = 0.0
        x[3, ::3] = -math.inf
        for k in {1, 2, 5, 32, 127, size // 2, size - 1, size} - {0}:
            if k > size:
                continue
            p = rows.entmax_forward(x, a, LOWEST, k, variant=variant)
            expected = naive_topk(x, k, a)
            assert torch.equal(p > 0, expected > 0) or a not in (0.0, 1.0), (size, k)
            assert (p - expected).abs().max() <= 2e-7, (size, k)
            assert int((p > 0).sum(-1).max()) <= k


def test_ties_at_the_cut_go_to_the_lowest_index(variant):
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])):
        p = rows.entmax_forward(x, 0.0, LOWEST, k, variant=variant)
        assert p[0].nonzero().flatten().tolist() == kept
    zeros = torch.randn(2, 1021).relu()  # about half of the entries are equal, 0
    p = rows.entmax_forward(zeros, 0.0, LOWEST, 700, variant=variant)
    assert torch.equal(p > 0, naive_topk(zeros, 700, 0.0) > 0)


def test_each_row_has_its_own_alpha(variant):
    x, a = torch.randn(2, 1021).relu(), torch.tensor([[0.0], [1.0]])
    p = rows.entmax_forward(x, a, LOWEST, 3, variant=variant)
    assert (p - torch.cat([naive_topk(x[:1], 3, 0.0), naive_topk(x[1:], 3, 1.0)])).abs().max() <= 2e-7


def test_masked_rows_are_zero_and_rows_with_nan_or_infinity_are_nan(variant):
    nan = torch.tensor([[1.0, math.nan, 3.0], [-math.inf, -math.inf, -math.inf], [0.0, math.inf, 1.0]])
    p = rows.entmax_forward(nan, 0.5, LOWEST, 2, variant=variant)
    assert p[0].isnan().all() and not p[1].any() and p[2].isnan().all()
