"""Half-precision attention computes its scores in float32, because rounded scores change the support."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import each_backend
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, entmax_attention, topk_attention, use_backend

# A warning of numpy in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def spread(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose scores are so large that a 16-bit number keeps few fractional bits."""
    query, key, value = torch.randn(3, 1, 2, length, 64)
    return (6 * query).to(dtype), key.to(dtype), value.to(dtype)


def assert_rounded_once(got: Tensor, expected: Tensor, values: Tensor) -> None:
    """Check that the output is rounded to the dtype of ``values`` only at the end, and weights at most once."""
    bound = torch.finfo(values.dtype).eps * values.detach().double().abs().max()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(bound))


@HALF
@each_backend("torch", "compiled", "triton")
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_short_attention(alpha: float, backend: str, dtype: torch.dtype) -> None:
    inputs = spread(23, dtype)
    with use_backend(backend):
        got = entmax_attention(*inputs, alpha)
    assert got.dtype == dtype
    assert_rounded_once(got, entmax_attention(*(x.double() for x in inputs), alpha), inputs[2])


@HALF
@each_backend("torch", "compiled")
def test_long_attention_and_its_gradient(backend: str, dtype: torch.dtype) -> None:
    inputs = spread(521, dtype)
    halves, wide = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    with use_backend(backend):
        got, expected = (entmax_attention(*some, 1.5, is_causal=True) for some in (halves, wide))
        assert_rounded_once(got.detach(), expected.detach(), inputs[2])
        upstream = torch.randn_like(got)
        gradients = torch.autograd.grad(got, halves, upstream), torch.autograd.grad(expected, wide, upstream.double())
    for gradient, exact in zip(*gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def exported(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    class Calls(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(query, key, value)

    return lambda *inputs: torch.export.export(Calls(), inputs).module()(*inputs)


@pytest.mark.parametrize("way", [compiled, exported, torch.func.vmap])
def test_compiled_exported_and_vmapped_attention(way: Callable[..., Callable[..., Tensor]]) -> None:
    inputs = spread(23, torch.bfloat16)
    got = way(lambda *some: entmax_attention(*some, 1.5))(*inputs)
    assert_rounded_once(got, entmax_attention(*(x.double() for x in inputs), 1.5), inputs[2])


def test_top_k_keeps_the_keys_with_the_largest_exact_scores() -> None:
    inputs = spread(23, torch.bfloat16)
    expected = topk_attention(*(x.double() for x in inputs), 3)
    assert_rounded_once(topk_attention(*inputs, 3), expected, inputs[2])


@pytest.mark.parametrize("length", [23, 521])
def test_autocast_rounds_only_inputs_and_output(length: int) -> None:
    inputs = [x.float().requires_grad_() for x in spread(length, torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = entmax_attention(*inputs, 1.5)
        # The backward pass also runs inside autocast.
        gradients = torch.autograd.grad(got.float().square().sum(), inputs)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    expected = entmax_attention(*rounded, 1.5)
    assert got.dtype == torch.bfloat16
    assert_rounded_once(got.detach(), expected.detach(), rounded[2].detach().bfloat16())
    exact = torch.autograd.grad(expected.square().sum(), rounded)
    for gradient, wanted in zip(gradients, exact, strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < 2e-2


@HALF
def test_scores_beyond_the_range_of_float16(dtype: torch.dtype) -> None:
    x = torch.full((1, 2, 23, 80), 256.0, dtype=dtype)
    assert torch.equal(entmax_attention(x, x, x, 1.0), x)
    long = torch.full((1, 1, 521, 80), 256.0, dtype=dtype)
    assert torch.equal(entmax_attention(long, long, long, 1.5), long)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_layer_returns_weights_in_its_dtype(cast: str) -> None:
    layer, dense = AdaptiveSparseMultiheadAttention(64, 2, batch_first=True), nn.MultiheadAttention(64, 2)
    x = torch.randn(2, 5, 64)
    for module in (layer, dense):
        getattr(module, cast)()
        some = x.to(module.out_proj.weight.dtype)
        output, weights = module(some, some, some)
        assert output.dtype == weights.dtype == some.dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = [[y.dtype for y in module.float()(x, x, x)] for module in (layer, dense)]
    assert dtypes[0] == dtypes[1]
