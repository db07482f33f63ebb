"""A new α does not compile the kernels of fused attention again; a new length does so only in a few cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused import tensors
from torch import Tensor

from sparse_attn.kernels import triton
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.triton.attention import backward as attention_backward
from sparse_attn.kernels.triton.attention import decode
from sparse_attn.kernels.triton.attention import forward as attention
from sparse_attn.versions import triton_before


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Collects a tuple per kernel that would be compiled.

    The tuple holds the constants and the types. For each integer on which Triton specialises, the tuple says whether
    the integer is 1 and whether 16 divides the integer.
    """
    found: set[Any] = set()

    def record(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        free = kernel.kwargs["do_not_specialize"] if triton.interpreted() else kernel.do_not_specialize

        def specialised(parameter: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(specialised(parameter, field) for field in value)
            if isinstance(value, Tensor):
                return value.dtype
            if parameter.isupper() or value is None:
                return value
            if isinstance(value, int) and parameter not in (free or ()):
                return value == 1, value % 16 == 0
            return type(value)

        key = [specialised(*pair) for pair in zip(kernel.arg_names, arguments, strict=True)]
        found.add((kernel.__name__, *key, *options.items()))

    for module in (attention, attention_backward, decode, decode.rows):
        monkeypatch.setattr(module, "launch", record)
    return found


@pytest.mark.skipif(triton_before(3, 6), reason="Triton's interpreter before 3.6 does not keep what `compiled` reads")
def test_new_values_of_alpha_compile_nothing(device, compiled):
    inputs = tensors(device)

    def count(*alphas: Any) -> int:
        compiled.clear()
        for alpha in alphas:
            output = fused_attention(*inputs, alpha, scale=0.3, offset=0)
            torch.autograd.grad(output, inputs, output.detach())
        return len(compiled)

    learnt = [
        torch.tensor(values, device=device, requires_grad=True) for values in ((1.0, 2.0), (1.3, 1.5), (2.5, 3.0))
    ]
    assert count(learnt[0]) == count(*learnt) == 5  # forward, two lists of tiles, two backward kernels
    assert count(1.2) == count(1.2, 1.3, 1.0001) == 5
    assert count(1.2, 1.5, 2.0) == 11  # three kernels for each α; the two lists of tiles are shared
    compiled.clear()
    for scale in (1, 2, 0.3):
        fused_attention(*inputs, 1.5, scale=scale)
    assert len(compiled) == 1


@pytest.mark.skipif(triton_before(3, 6), reason="Triton's interpreter before 3.6 does not keep what `compiled` reads")
def test_new_lengths_compile_only_if_16_divides_the_number_of_keys(device, compiled):
    def count(*lengths: tuple[int, int]) -> int:
        compiled.clear()
        for queries, keys in lengths:
            query, key = (torch.zeros(1, 2, n, 16, device=device, requires_grad=True) for n in (queries, keys))
            output = fused_attention(query, key, key, 1.5, scale=0.3, offset=keys - queries)
            torch.autograd.grad(output, query, output.detach())
        return len(compiled)

    lengths = [(97, 97), (101, 125), (112, 127), (128, 113), (111, 111)]
    assert count(lengths[0]) == count(*lengths) == 5
    assert count(*lengths, (96, 96), (97, 112), (112, 128)) == 8  # three more kernels; the lists of tiles are shared
    compiled.clear()
    key = torch.zeros(1, 2, 4111, 16, device=device)
    for keys in (4097, 4098, 4099, 4111):  # a cache that grows
        fused_attention(key[:, :, :1], key[:, :, :keys], key[:, :, :keys], 1.5, scale=0.3)
    assert len(compiled) == 3
