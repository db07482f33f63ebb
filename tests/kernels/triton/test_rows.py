"""Row kernels in Triton: values and gradients equal the reference in float64, for many α and kinds of rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn import entmax, entmax_loss, sparse_softmax, topk_softmax
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.reference import entmax as reference
from sparse_attn.kernels.triton import rows

LOWEST = torch.finfo(torch.float32).min
ALPHAS = torch.tensor([1.0, 1.0001, 1.01, 1.3, 1.5, 1.9, 2.0, 0.7, 2.7])


def assert_close(got: Tensor, expected: Tensor, bound: float = 2e-6, floor: float = 0.0) -> None:
    """Compare each row relative to its own largest entry, so that no row of large entries hides an error elsewhere."""
    assert got.shape == expected.shape
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=floor)
    worst = ((got.double() - expected).abs() / scale.clamp(min=1e-30)).max()
    assert worst <= bound, worst


def rows_of(size: int, device: torch.device) -> Tensor:
    """A row for each α. Some have masked entries, large or nearly equal scores, scores far from 0, or one peak."""
    x = torch.randn(9, size, device=device) * 2
    x[1, ::3] = -math.inf
    x[2, 1::2] = LOWEST
    x[3] *= 20
    x[4] *= 1e-2
    x[5] += 300
    x[6] = torch.where(torch.arange(size, device=device) == size // 2, 0.9, 0.0)
    return x


@pytest.mark.parametrize("size", [1, 2, 61, 1021, 16411])
@pytest.mark.parametrize("alpha", ["per row", 1.0, 1.3, 1.5, 2.0, 3.0])
def test_values_and_gradients_equal_the_reference(size, alpha, device):
    if size == 16411 and alpha in (1.3, 2.0, 3.0):
        pytest.skip("long rows are slow in the interpreter, and the other α cover the loops")
    x = rows_of(size, device)
    a = (ALPHAS.to(device) - 1)[:, None] if alpha == "per row" else alpha - 1
    wide = a.double() if isinstance(a, Tensor) else a
    upstream = torch.randn_like(x) + 5
    p, expected = rows.entmax_forward(x, a, LOWEST), reference.entmax_forward(x.double(), wide, LOWEST)
    assert_close(p, expected)
    scores = x.clone()
    assert rows.entmax_forward(scores, a, LOWEST, in_place=True) is scores and torch.equal(scores, p)
    assert (p[:, :1] * 0 == 0).all() and ((p.sum(-1) - 1).abs() < 1e-6)[3:].all()
    assert not p[1, ::3].any() and not p[2, 1::2].any()
    # The reference gets the same float32 p, so that rounding of p does not count as an error of the backward.
    with_alpha = alpha in ("per row", 1.3)
    got = rows.entmax_backward(p, a, upstream, with_alpha)
    wanted = reference.entmax_backward(p.double(), wide, upstream.double(), with_alpha=with_alpha)
    assert_close(got[0], wanted[0], 3e-6, floor=1e-4)  # the gradient of a row of one entry is zero up to rounding
    assert (got[1] is None) is not with_alpha
    if with_alpha and size > 2:
        largest = float(wanted[1].abs().max())
        assert (got[1].double() - wanted[1]).abs().max() <= 2e-6 * largest


@pytest.mark.parametrize("size", [59, 100, 16411])
def test_equal_scores_get_equal_weights_at_large_alpha(size, device):
    x = torch.stack([torch.full((size,), score, device=device) for score in (0.0, -5.0, 7.3)])
    for alpha in (10.0, 12.0):
        assert (rows.entmax_forward(x, alpha - 1, LOWEST) * size - 1).abs().max() <= 1e-6, alpha


@pytest.mark.parametrize(("size", "alpha"), [(61, 23.0), (61, 40.0), (8191, 11.0), (16411, 11.0)])
def test_gradients_of_equal_scores_do_not_overflow_at_large_alpha(size, alpha, device):
    p = torch.full((3, size), 1 / size, device=device)
    p[1, 1::2] = 0.0
    upstream = torch.randn_like(p) * 1e-3
    got = rows.entmax_backward(p, alpha - 1, upstream, True)
    wanted = reference.entmax_backward(p.double(), alpha - 1, upstream.double(), with_alpha=True)
    if alpha < 40:  # below 40, p^(2-α) is within the range of float32, but its sum is not
        assert_close(got[0], wanted[0], 3e-6)
    assert not got[0][1, 1::2].any()
    assert got[1].abs().max() <= 1e-6 * float(upstream.abs().max())


@pytest.mark.parametrize("size", [61, 8191, 16411])
def test_top_k_takes_the_first_of_ties(size, device):
    x = torch.randint(-3, 4, (5, size), device=device).float()
    x[1] *= -0.0
    x[2, 4:] = -math.inf
    for k, a in ((1, 0.0), (7, 1.0), (7, (ALPHAS[2:7].to(device) - 1)[:, None])):
        wide = a.double() if isinstance(a, Tensor) else a
        p = rows.entmax_forward(x, a, LOWEST, k)
        assert_close(p, reference.topk_entmax_forward(x.double(), k, wide, LOWEST))


def test_half_precision_is_computed_in_float32(device):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 61, device=device).to(dtype)
        low = torch.finfo(dtype).min
        x[0, :5] = low
        p = rows.entmax_forward(x, 0.3, low)
        assert p.dtype == dtype and not p[0, :5].any()
        torch.testing.assert_close(p, reference.entmax_forward(x.double(), 0.3, low).to(dtype), atol=0, rtol=1e-2)
        grad, _ = rows.entmax_backward(p, 0.3, torch.ones_like(p))
        assert grad.dtype == dtype


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch, about its check for forward mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_without_conversion_if_no_gradient_is_needed(dtype, device, monkeypatch):
    seen = []
    launch = rows.launch
    monkeypatch.setattr(rows, "launch", lambda *args, **how: seen.append(args[2].dtype) or launch(*args, **how))
    rounding = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates bfloat16 instead of rounding
    x = torch.randn(9, 61, device=device).to(dtype)
    for alpha in (1.5, ALPHAS[:, None].to(device)):
        learnt = x.clone().requires_grad_()
        torch.testing.assert_close(entmax(x, alpha), entmax(learnt, alpha), atol=0, rtol=rounding)
        with torch.no_grad():
            assert torch.equal(topk_softmax(learnt, 5), topk_softmax(x, 5))
    assert seen == [dtype, torch.float32, dtype, dtype] * 2
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(entmax(forward_ad.make_dual(x, x), 1.5)).tangent.dtype == dtype
    assert seen[-1] == torch.float32
    with torch.autocast(device.type, dtype):
        assert entmax(x).dtype == torch.softmax(x, -1).dtype


def test_nan_infinity_and_invalid_alpha_affect_only_their_rows(device):
    x = torch.randn(6, 61, device=device)
    x[0, 3], x[1, 3], x[2] = math.nan, math.inf, -math.inf
    for a in (0.5, 1.0, torch.tensor([0.3, 0.3, 0.3, math.nan, -1.0, 0.3], device=device)[:, None]):
        p = rows.entmax_forward(x, a, LOWEST)
        bad = [0, 1, 3, 4] if isinstance(a, Tensor) else [0, 1]
        assert p[bad].isnan().all() and not p[2].any()
        assert p[[row for row in range(6) if row not in bad]].isfinite().all()
        grad, grad_a = rows.entmax_backward(p, a, torch.ones_like(p), True)
        assert grad[bad].isnan().all() and not grad[2].any() and grad_a[2] == 0


def test_any_strides_and_no_rows(device):
    x = torch.randn(7, 5, 61, device=device)
    alpha = ALPHAS[:5, None].to(device) - 1
    for view in (x.transpose(0, 1)[:, :5], x.permute(2, 1, 0), x[::2, :, ::3], x[:, :0]):
        a = alpha if view.shape[-2] == 5 else 0.5
        expected = reference.entmax_forward(view.double(), a.double() if isinstance(a, Tensor) else a, LOWEST)
        got = rows.entmax_forward(view, a, LOWEST)
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_operators_call_the_kernels(device, monkeypatch):
    calls = []
    launch = rows.launch
    monkeypatch.setattr(
        rows, "launch", lambda kernel, *rest, **how: calls.append(kernel) or launch(kernel, *rest, **how)
    )
    x = torch.randn(3, 61, device=device, requires_grad=True)
    alpha = torch.tensor([1.2, 1.5, 2.0], device=device, requires_grad=True)
    target = torch.tensor([3, 5, 7], device=device)
    loss = entmax_loss(x, target, 1.5) + entmax(x, alpha[:, None]).square().sum() + topk_softmax(x, 3).square().sum()
    loss.backward()
    wide, wide_alpha = (v.detach().double().requires_grad_() for v in (x, alpha))
    expected = entmax_loss(wide, target, 1.5) + entmax(wide, wide_alpha[:, None]).square().sum()
    expected = expected + topk_softmax(wide, 3).square().sum()
    expected.backward()
    assert len(calls) == 5  # 3 forward and 2 backward calls: the backward of the loss reuses the probabilities
    assert_close(x.grad, wide.grad)
    assert_close(alpha.grad, wide_alpha.grad)
    assert not dispatch.by_triton(wide)


def test_second_derivatives_equal_those_in_float64(device):
    x = torch.randn(2, 7, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax(x, 1.3).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(entmax(wide, 1.3).square().sum(), wide, create_graph=True)
    assert_close(second, torch.autograd.grad(grad.square().sum(), wide)[0], 1e-5)


def test_compiled_operators_equal_eager_operators(device):
    x = torch.randn(2, 61, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return sparse_softmax(x, 5).square() + entmax(x, 1.3)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = function(x)
    upstream = torch.randn_like(eager)
    torch.testing.assert_close(compiled(x), eager)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (compiled(x), eager)]
    torch.testing.assert_close(*grads)
