"""Comparison of attention in C with attention with one matrix of scores in float64, including gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import entmax_attention, use_backend
from sparse_attn.kernels.cpu import attention

SPECIAL_NUMBERS = (math.inf, -math.inf, math.nan, 1e-39)  # 1e-39 is below the smallest normal number
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def force(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all calls of attention in C use the given variant."""
    forward, backward = attention.forward, attention.backward
    monkeypatch.setattr(attention, "forward", lambda *args: forward(*args, variant=variant))
    monkeypatch.setattr(attention, "backward", lambda *args: backward(*args, variant=variant))


def run(attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs, for an upstream gradient that depends only on the output's shape."""
    output = attend(*inputs)
    upstream = torch.linspace(-9, 9, output.numel(), dtype=torch.float64).sin().view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def compare(attend, inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Check that the C kernel is called and agrees with plain torch in float64, relative to the largest entry."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    calls = []
    forward = attention.forward
    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
        got = run(attend, inputs)
    assert calls
    with monkeypatch.context() as patch, use_backend("torch"):
        patch.setattr(choose, "_LARGE", 2**60)
        wanted = run(attend, wide)
    for i, (actual, right) in enumerate(zip(got, wanted, strict=True)):
        assert not actual.isnan().any()
        error = (actual.double() - right).abs().max() / right.abs().max().clamp(min=1e-3)
        assert error < BOUNDS[inputs[0].dtype], (i, error)
    return got


def compare_special_numbers(
    number: float, place: str, keys: int, variants: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that two variants agree in bfloat16 if some entries of the queries, the keys or both are ``number``."""
    inputs = [x.bfloat16() for x in tensors(torch.float32, 31, keys, sizes=(64, 8))]
    if place in ("query", "both"):
        inputs[0][0, 1, 5, 7] = inputs[0][1, 0, 3, 8] = number
    if place in ("key", "both"):
        inputs[1][0, 0, 11, 7] = inputs[1][1, 2, 3, 8] = number
    outputs = []
    for variant in variants:
        with monkeypatch.context() as patch:
            force(variant, patch)
            outputs.append(entmax_attention(*inputs))
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=1e-3, equal_nan=True)


def tensors(
    dtype: torch.dtype, queries: int = 61, keys: int = 67, *, heads: int = 3, kv_heads: int = 3, sizes=(5, 7)
) -> list[Tensor]:
    shapes = ((heads, queries, sizes[0]), (kv_heads, keys, sizes[0]), (kv_heads, keys, sizes[1]))
    return [torch.randn(2, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
