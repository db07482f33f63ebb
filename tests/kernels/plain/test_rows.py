"""The plain torch backend equals the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.plain import rows as torch_rows
from sparse_attn.kernels.reference import entmax as reference

LOWEST = torch.finfo(torch.float32).min
ALPHAS = (0.7, 1.0, 1.0001, 1.2, 1.5, 1.7, 2.0, 3.0)
TENSORS = {"between 1 and 2": [1.0, 1.000001, 1.3, 1.5, 2.0], "beyond": [0.8, 1.3, 1.5, 2.0, 2.5]}


@pytest.fixture(autouse=True, params=[100, 10_000], ids=["shortened", "whole"])
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch_rows, "_BUFFERED", 600)
    monkeypatch.setattr(torch_rows, "_SMALL", 0)
    monkeypatch.setattr(torch_rows, "_LONG", request.param)


def rows(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (7, 5, size) of seven scales; some are flat, masked, partly masked, or far from zero."""
    x = torch.randn(7, 5, size, dtype=dtype) * torch.logspace(-2, 2, 7, dtype=dtype).view(-1, 1, 1)
    x[2, 3] = 1.5
    x[3, :, 0] = -math.inf
    x[4, 1] = LOWEST
    x[5] += 1e4
    return x


def shifts(alpha: object) -> float | Tensor:
    return torch.tensor(TENSORS[alpha]).view(5, 1) - 1 if isinstance(alpha, str) else alpha - 1


@pytest.mark.parametrize("size", [1, 13, 257, 1021])
@pytest.mark.parametrize("alpha", [*ALPHAS, *TENSORS])
def test_probabilities(alpha, size):
    x, a = rows(size), shifts(alpha)
    wide = a.double() if isinstance(a, Tensor) else a
    exact = reference.entmax_forward(x.double(), wide, LOWEST)
    got = torch_rows.entmax_forward(x, a, LOWEST)
    torch.testing.assert_close(got.double(), exact, atol=3e-7, rtol=1e-6)
    torch.testing.assert_close(torch_rows.entmax_forward(x.double(), wide, LOWEST), exact, atol=1e-14, rtol=1e-11)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # all, some or few entries have weight
@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.7, 2.0, "per row"])
def test_long_rows(alpha, scale):
    a = torch.tensor([[0.3], [0.5], [1.0]]) if alpha == "per row" else alpha - 1
    x = scale * torch.randn(3, 5003)
    x[1, :4999], x[2] = -math.inf, LOWEST
    exact = reference.entmax_forward(x.double(), a.double() if isinstance(a, Tensor) else a, LOWEST)
    torch.testing.assert_close(torch_rows.entmax_forward(x, a, LOWEST).double(), exact, atol=3e-7, rtol=1e-6)


def test_rows_with_few_nonzero_weights_are_shortened(monkeypatch):
    monkeypatch.setattr(torch_rows, "_LONG", 1000)
    seen = []
    plain = torch_rows._write
    monkeypatch.setattr(torch_rows, "_write", lambda p, *others: seen.append(p.shape[-1]) or plain(p, *others))
    for x in (torch.randn(3, 5003), torch.zeros(3, 5003)):
        torch_rows.entmax_forward(x, 1.0, LOWEST)
    assert max(seen[:-1]) < 5003 / 4 and seen[-1] == 5003


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("alpha", [*ALPHAS, *TENSORS])
def test_gradients(alpha, with_alpha, dtype):
    x, a = rows(257, dtype), shifts(alpha)
    a = a.to(dtype) if isinstance(a, Tensor) else a
    p = torch_rows.entmax_forward(x, a, LOWEST)
    grad = torch.randn_like(p) + 3
    expected = reference.entmax_backward(p, a, grad, with_alpha=with_alpha)
    got = torch_rows.entmax_backward(p, a, grad, with_alpha=with_alpha)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-7}
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, "between 1 and 2"])
def test_undefined_rows_do_not_change_the_others(alpha):
    x, a = rows(257), shifts(alpha)
    clean = torch_rows.entmax_forward(x, a, LOWEST)
    x[0, 0, 11], x[1, 2, 256] = math.nan, math.inf
    got = torch_rows.entmax_forward(x, a, LOWEST)
    undefined = got.isnan()
    assert undefined[0, 0].all() and undefined[1, 2].all() and undefined.sum() == 2 * 257
    torch.testing.assert_close(got[~undefined], clean[~undefined], atol=2e-7, rtol=0)


@pytest.mark.parametrize("alpha", [1.0001, 1.3, 1.5, 2.0])
def test_masked_entries_have_no_weight_if_the_other_scores_are_low(alpha):
    x = torch.randn(5, 300).sub_(1000.0)
    x[:, ::3] = -1003.0
    got = torch_rows.entmax_forward(x, alpha - 1, lowest=-1003.0)
    exact = reference.entmax_forward(x.masked_fill(x <= -1003.0, -math.inf).double(), alpha - 1, LOWEST)
    assert (got[x <= -1003.0] == 0).all()
    torch.testing.assert_close(got.double(), exact, atol=3e-7, rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_topk_equals_the_reference_with_and_without_ties(a, ties):
    x = rows(31).round() if ties else rows(31)
    expected = reference.topk_entmax_forward(x, 5, a, LOWEST)
    got = torch_rows.topk_entmax_forward(x, 5, a, LOWEST)
    torch.testing.assert_close(got, expected, atol=2e-7, rtol=0)
    assert torch.equal(got > 0, expected > 0)
