"""Products that skip zeros are the dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.cpu import products, rows
from sparse_attn.kernels.plain import products as dense

pytestmark = pytest.mark.skipif(not rows.available(), reason="no compiled kernels")


def mostly_zero(count: int, size: int, dtype: torch.dtype, density: float = 0.1) -> Tensor:
    return torch.randn(count, size, dtype=dtype) * (torch.rand(count, size) < density)


def close(got: Tensor, expected: Tensor) -> None:
    bound = 1e-12 if got.dtype == torch.float64 else 1e-4  # up to a thousand terms one by one
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("count", "size", "width"), [(1, 1, 1), (7, 13, 5), (61, 1031, 37), (257, 523, 64)])
def test_are_dense_products(count, size, width, density, dtype):
    p = mostly_zero(count, size, dtype, density)
    x, per_row = torch.randn(size, width, dtype=dtype), torch.randn(count, width, dtype=dtype)
    close(products.gathered(p, x), dense.gathered(p, x))
    close(products.sampled(p, per_row, x), dense.sampled(p, per_row, x) * (p != 0))
    start = torch.randn(size, width, dtype=dtype)
    got, expected = start.clone(), start.clone()
    products.scatter_(got, p, per_row)
    dense.scatter_(expected, p, per_row)
    close(got, expected)


def test_rows_may_lie_apart():
    wide = torch.randn(23, 3, 11)
    p, x, per_row = mostly_zero(17, 46, torch.float32)[:, ::2].contiguous(), wide[:, 1], torch.randn(17, 2, 11)[:, 0]
    close(products.gathered(p, x), p @ x)
    close(products.sampled(p, per_row, x), (per_row @ x.T) * (p != 0))
    out = torch.zeros(23, 2, 11)
    products.scatter_(out[:, 1], p, per_row)
    close(out[:, 1], p.T @ per_row)
    assert not out[:, 0].any()


def test_what_lies_at_a_zero_is_not_looked_at_and_nan_is_no_zero():
    p = torch.zeros(2, 19)
    p[0, 3], p[1, 18] = 2.0, math.nan
    x = torch.full((19, 5), math.nan)
    x[3] = 1.5
    got = products.gathered(p, x)
    assert got[0].tolist() == [3.0] * 5
    assert got[1].isnan().all()


def test_worth_it_for_few_entries_of_one_dtype():
    x = torch.randn(64, 8)
    sparse, full = mostly_zero(16, 64, torch.float32, 0.01), torch.ones(16, 64)
    assert products.worth_it(sparse, x)
    assert not products.worth_it(full, x)
    assert not products.worth_it(sparse, x.double())
    assert not products.worth_it(sparse.bfloat16(), x.bfloat16())
    assert not products.worth_it(sparse, torch.randn(8, 64).T)
