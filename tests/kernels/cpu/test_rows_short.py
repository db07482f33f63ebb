"""Short rows, which are solved side by side, have the results of rows that are solved alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows

pytestmark = pytest.mark.skipif(not rows.available(), reason="no compiled kernels")
LOWEST = -3.3e38


def special_rows(size: int, dtype: torch.dtype) -> Tensor:
    x = 2 * torch.randn(37, size, dtype=dtype)
    x[1] = -math.inf
    x[2, : size // 2] = -math.inf
    x[3, 0] = math.nan
    x[4, -1] = math.inf
    x[5] = 0.0
    x[6] = x[6].round()
    x[7, size // 3] += 40
    x[8] /= 1000
    x[9, 1:] = -math.inf
    x[10] += 1e6
    x[11] *= 1e37
    return x


def gradients(p: Tensor, a: float, grad: Tensor, variant: str) -> list[Tensor]:
    without_alpha, _ = rows.entmax_backward(p, a, grad, variant=variant)
    grad_scores, grad_a = rows.entmax_backward(p, a, grad, True, variant=variant)
    assert grad_a is not None
    return [without_alpha, grad_scores, grad_a]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.1, 1.3, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 29, 61, 64, 67, 127, 128])
def test_short_rows_have_the_results_of_rows_alone(size, alpha, k, variant):
    a = alpha - 1
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        x = special_rows(size, dtype)
        p = torch.cat([rows.entmax_forward(row[None], a, LOWEST, k, variant=variant) for row in x])
        got = rows.entmax_forward(x, a, LOWEST, k, variant=variant)
        torch.testing.assert_close(got, p, rtol=0, atol=bound, equal_nan=True)
        grad = torch.randn_like(x)
        together = gradients(p, a, grad, variant)
        alone = [gradients(p[i : i + 1], a, grad[i : i + 1], variant) for i in range(len(x))]
        for got, wanted in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(got, torch.cat(wanted), rtol=bound, atol=2 * bound, equal_nan=True)


def test_strided_rows_half_precision_and_in_place():
    x = torch.randn(67, 50).T[::2]
    for y in (x, x.half(), x.bfloat16()):
        for alpha in (1.0, 1.3, 1.5, 2.0):
            wanted = rows.entmax_forward(y.float().contiguous(), alpha - 1, LOWEST).to(y.dtype)
            assert torch.equal(rows.entmax_forward(y, alpha - 1, LOWEST), wanted)
    y = torch.randn(23, 31)
    wanted = rows.entmax_forward(y, 0.5, LOWEST)
    assert rows.entmax_forward(y, 0.5, LOWEST, in_place=True) is y and torch.equal(y, wanted)


def test_results_do_not_depend_on_the_number_of_threads_or_the_form_of_alpha():
    x, a = torch.randn(701, 3, 67), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).view(3, 1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        p = rows.entmax_forward(x, a, LOWEST)
        results.append([p, *rows.entmax_backward(p, a, x, True)])
    torch.set_num_threads(before)
    p = rows.entmax_forward(x, a.expand(701, 3, 1).contiguous(), LOWEST)
    results.append([p, *rows.entmax_backward(p, a.expand(701, 3, 1).contiguous(), x, True)])
    for got in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(got, results[0], strict=True))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("size", [29, 67, 101, 127])
def test_an_entry_just_inside_the_support_keeps_its_weight(size, alpha, variant):
    a = alpha - 1
    generator = torch.Generator().manual_seed(size)
    x = torch.full((160, size), -30.0)
    x[:, 0] = 0.0
    x[:, 1] = -torch.rand(160, generator=generator) * 0.9 / a
    # With only the first two entries, the edge of the support is at -p^a / a, where p is the first probability.
    two = rows.entmax_forward(x[:, :2].double(), a, LOWEST, variant=variant)
    edge = -(two[:, 0] ** a) / a
    x[:, 2] = edge + torch.rand(160, generator=generator) * 1e-4
    exact = rows.entmax_forward(x.double(), a, LOWEST, variant=variant)
    assert (exact[:, 2] > 0).any()
    torch.testing.assert_close(rows.entmax_forward(x, a, LOWEST, variant=variant).double(), exact, rtol=0, atol=1e-6)
