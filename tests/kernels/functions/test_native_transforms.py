"""The operator of attention in C under opcheck, torch.compile, vmap and autocast."""

from __future__ import annotations

import pytest
import torch
from c_rows import needs_library
from native_attention import run, tensors
from old_torch import since_torch
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import entmax_attention, topk_attention
from sparse_attn.kernels.functions import native

pytestmark = needs_library


# From torch 2.14 on, opcheck itself reads this attribute.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("training", [False, True])
def test_the_operator_passes_opcheck(training):
    tensors_ = [x.requires_grad_(training) for x in tensors(torch.float32, 11, 13)]
    alpha = torch.tensor([1.2, 1.5, 2.0], requires_grad=training)
    numbers = (0.0, 0.4, 0.0, None, None, None)
    arguments = (
        *tensors_,
        alpha,
        torch.randn(1, 1, 11, 13, requires_grad=training),
        None,
        None,
        None,
        *numbers,
        training,
    )
    torch.library.opcheck(native._attention, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_as_one_graph():
    inputs = [x.requires_grad_() for x in tensors(torch.float32, 33, 37)]
    alpha = torch.tensor([1.2, 1.5, 2.0], requires_grad=True)
    for attend, extra in (
        (lambda q, k, v, a: entmax_attention(q, k, v, a, is_causal=True), [alpha]),
        (lambda q, k, v: topk_attention(q, k, v, 5), []),
    ):
        compiled = torch.compile(attend, fullgraph=True)
        for got, wanted in zip(run(compiled, [*inputs, *extra]), run(attend, [*inputs, *extra]), strict=True):
            torch.testing.assert_close(got, wanted)


@since_torch(2, 8, "taking the minimum of two symbolic lengths limits a graph to some of the lengths")
def test_one_graph_trains_with_several_lengths():
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entmax_attention, fullgraph=True, backend=graphs, dynamic=True)
    first = None
    # With these numbers of keys, a tile has at most 48, 36 or 12 queries.
    for queries, keys in ((17, 19), (2, 61), (53, 5), (3, 2503), (5, 5003)):
        inputs = [x.requires_grad_() for x in tensors(torch.float64, queries, keys)]
        for got, wanted in zip(run(compiled, inputs), run(entmax_attention, inputs), strict=True):
            torch.testing.assert_close(got, wanted)
        first = first or graphs.frame_count
    assert graphs.frame_count == first


def test_vmap_and_batched_gradients():
    query, key, value = (x.requires_grad_() for x in tensors(torch.float64, 11, 13))
    mapped = torch.func.vmap(entmax_attention)(query, key, value)
    output = entmax_attention(query, key, value)
    torch.testing.assert_close(mapped, output)
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, (query, key), upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for got, wanted in zip(
            batched, torch.autograd.grad(output, (query, key), upstream[i], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[i], wanted)


def test_the_output_under_autocast_has_the_dtype_of_autocast():
    query, key, value = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entmax_attention(query, key, value).dtype == torch.bfloat16
