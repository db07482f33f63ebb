"""How a call of fused attention is run: skipped tiles, the decoding kernel, strides and offsets of inputs, TF32."""

from __future__ import annotations

import math

import pytest
import torch
from fused import ALPHAS, compare, expected, tensors
from old_torch import since_torch
from torch import Tensor

from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import arguments, decode, entry, plan
from sparse_attn.kernels.triton.attention import forward as attention


def test_tiles_without_weight_are_skipped(device):
    query, key, value = tensors(device, heads=1, queries=70, keys=300)
    with torch.no_grad():
        query[..., 0] = 20.0
        key[..., 0] = -1.0
        key[:, :, 40:50, 0] = 1.0  # the only keys with weight
    compare((query, key, value), 1.5)
    sizes = plan.Plan.of(query, value)
    setting = Setting(0.5, 0.3, 0.0, None)
    *_, flags = attention.forward(query, key, value, None, None, None, None, setting, True)
    used = sorted({position // sizes.block_n for position in range(40, 50)})
    assert flags.shape[2] >= 9
    assert flags.sum((0, 1)).nonzero()[:, 0].tolist() == used


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, "per head"])
def test_the_decoding_kernels_are_used_for_few_queries_and_many_keys(alpha, device, monkeypatch):
    monkeypatch.setattr(decode, "_MANY", 100)
    monkeypatch.setattr(decode, "_SPLITS", 2)
    calls = []
    forward = decode.forward
    monkeypatch.setattr(decode, "forward", lambda *args: calls.append(args) or forward(*args))
    inputs = [x.detach() for x in tensors(device, batch=2, heads=6, groups=3, queries=3, keys=307)]
    alpha = torch.tensor(ALPHAS, device=device) if alpha == "per head" else alpha
    mask = torch.randn(1, 6, 3, 307, device=device)
    mask[..., 100:200] = -math.inf
    how = {"scale": 0.3, "offset": 304, "key_lengths": torch.tensor([307, 251], device=device)}
    output = fused_attention(*inputs, alpha, mask, **how)
    assert len(calls) == 1
    wide_alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    wanted = expected(*(x.double() for x in inputs), wide_alpha, mask.double(), **how)
    assert (output - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_entries_that_are_not_contiguous_are_copied(device, monkeypatch):
    inputs = [torch.randn(1, 2, 16, 5, device=device).transpose(-2, -1) for _ in range(3)]
    seen = []
    forward = entry.forward
    monkeypatch.setattr(entry, "forward", lambda *args: seen.extend(args[:3]) or forward(*args))
    output = fused_attention(*inputs, 1.5, scale=0.3)
    assert all(x.stride(-1) == 1 for x in seen)
    torch.testing.assert_close(output, fused_attention(*(x.contiguous() for x in inputs), 1.5, scale=0.3))


def test_rows_at_offsets_beyond_32_bits_are_read_correctly(device, tmp_path):
    """Large sequence-first tensors have such offsets. Unwritten pages of the sparse file used here take no memory."""
    if device.type != "cpu":
        pytest.skip("scripts/gpu_check.py has this check for a device")
    stride, rows = 2**27, 37
    size = (rows - 1) * stride + 16
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * size)
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    far = storage.as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    far.copy_(torch.randn(far.shape))
    near = far.contiguous()
    results = []
    for x in (far, near):
        inputs = [x.detach().requires_grad_() for _ in range(3)]
        output = fused_attention(*inputs, 1.5, scale=0.3, offset=0)
        results.append((output, *torch.autograd.grad(output, inputs, near)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@since_torch(2, 9, "torch has only one setting for TF32")
def test_both_settings_of_torch_allow_tf32(device):
    inputs = tensors(device)
    setting = Setting(0.5, 0.3, 0.0, None)

    def precision() -> str:
        fused_attention(*inputs, 1.5, scale=0.3)
        return arguments.arguments_of(*inputs, None, None, None, None, setting)[2].precision

    assert precision() == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # from now on, torch refuses to return the older setting
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
