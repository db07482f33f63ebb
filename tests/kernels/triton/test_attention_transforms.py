"""Fused attention under torch.compile, higher derivatives, checkpointing and CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from fused import expected, tensors
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn.kernels.functions import fused as operator
from sparse_attn.kernels.functions.fused import fused_attention


@pytest.mark.filterwarnings("ignore")  # warnings of `opcheck`
def test_the_custom_operator_passes_opcheck(device):
    inputs = tensors(device, queries=5, keys=7)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    mask = torch.randn(1, 1, 5, 7, device=device, requires_grad=True)
    arguments = (alpha, mask, None, None, 0.0, 0.3, 0.0, 2)
    torch.library.opcheck(operator._attention, (*inputs, *arguments, True))
    without = [None if x is None else x.detach() for x in (*inputs, *arguments[:4])]
    torch.library.opcheck(operator._attention, (*without, *arguments[4:], False))


@pytest.mark.filterwarnings("ignore")  # warnings of torch during compilation
def test_compiled_attention_equals_eager_attention(device):
    inputs = tensors(device, queries=13, keys=17)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    mask = torch.randn(1, 1, 13, 17, device=device, requires_grad=True)

    def attend(*inputs: Tensor) -> Tensor:
        return fused_attention(*inputs, scale=0.3).square()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    everything = (*inputs, alpha, mask)
    upstream = torch.randn(1, 2, 13, 23, device=device)
    outputs = [function(*everything) for function in (compiled, attend)]
    assert torch.equal(*outputs)
    grads = [torch.autograd.grad(output, everything, upstream) for output in outputs]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*everything), outputs[1])


@pytest.mark.filterwarnings("ignore")
def test_compiled_attention_takes_new_lengths_and_drops_weights(device):
    compiles = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def attend(*inputs: Tensor, dropout_p: float = 0.0) -> Tensor:
        return fused_attention(*inputs, scale=0.3, offset=0, dropout_p=dropout_p)

    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    counts = []
    for queries, keys in ((13, 17), (19, 23), (11, 29)):
        inputs = (*tensors(device, queries=queries, keys=keys), alpha)
        torch.testing.assert_close(attend(*inputs), fused_attention(*inputs, scale=0.3, offset=0))
        counts.append(compiles.frame_count)
    assert counts[0] == counts[-1]  # nothing was compiled again
    *others, value = inputs[0], inputs[1], torch.ones_like(inputs[2]).requires_grad_()
    output = attend(*others, value, alpha, dropout_p=0.5)
    assert output.std() > 0.1
    # With values of 1, output and gradient both sum the weights that dropout kept. The totals agree if the backward
    # pass drops the same weights as the forward pass.
    (grad,) = torch.autograd.grad(output, value, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), output.sum())


def test_second_derivatives_equal_float64_and_both_backwards_drop_the_same_weights(device):
    inputs = tensors(device, queries=5, keys=7)
    alpha = torch.tensor([1.3, 1.6], device=device, requires_grad=True)

    def second(attend, inputs):
        (grad,) = torch.autograd.grad(attend(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    got = second(lambda *x: fused_attention(*x, scale=0.3), (*inputs, alpha))
    wide = [x.detach().double().requires_grad_() for x in (*inputs, alpha)]
    for actual, wanted in zip(got, second(expected, wide), strict=True):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    torch.manual_seed(3)  # `create_graph` selects the plain backward
    output = fused_attention(*inputs, alpha, dropout_p=0.5, scale=0.3)
    plain, fused = (
        torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=graph, retain_graph=True)
        for graph in (True, False)
    )
    for pair in zip(plain, fused, strict=True):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_batched_gradients_equal_separate_gradients(device):
    inputs = tensors(device, queries=3, keys=7)
    output = fused_attention(*inputs, 1.5, scale=0.3)
    upstream = torch.randn(2, *output.shape, device=device)
    batched = torch.autograd.grad(output, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for number, one in enumerate(upstream):
        for got, wanted in zip(batched, torch.autograd.grad(output, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(got[number], wanted, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_drops_the_same_weights(device):
    inputs = tensors(device, queries=5, keys=7)

    def attend(*inputs: Tensor) -> Tensor:
        return fused_attention(*inputs, 1.5, dropout_p=0.5, scale=0.3)

    results = []
    for function in (attend, lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(1)
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_cuda_graph(device):
    inputs = [x.detach() for x in tensors(device)]
    alpha = torch.tensor([1.3, 2.0], device=device)
    expected = fused_attention(*inputs, alpha, scale=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_attention(*inputs, alpha, scale=0.3)
    graph.replay()
    torch.testing.assert_close(output, expected)
