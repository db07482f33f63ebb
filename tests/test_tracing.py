"""Graphs from jit, ONNX, make_fx, functorch and symbolic tracing compute the values of eager code for other inputs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from backends import each_backend
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch.func import functionalize, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    Entmax,
    SparseAttention,
    TopKMultiheadAttention,
    budget_sparsemax,
    entmax,
    entmax_attention,
    entmax_attention_varlen,
    entmax_loss,
    normmax,
    replace_attention,
    sparse_softmax,
    sparsemax,
    topk_attention,
    topk_softmax,
    use_backend,
)

# Warnings of the tracers and exporters themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def swapped(layer: type[nn.MultiheadAttention], **kwargs: Any) -> nn.Module:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 11, batch_first=True), 1)
    replace_attention(encoder, layer=layer, **kwargs)
    return encoder.eval()


ROWS = (3, 5)
HEADS = (2, 3, 5, 7)
TARGET = torch.tensor([0, 4, 2])
# name -> the model, and the shapes of its inputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "entmax 1": (lambda: Calls(lambda x: entmax(x, 1.0)), (ROWS,)),
    "entmax 1.3": (lambda: Calls(lambda x: entmax(x, 1.3)), (ROWS,)),
    "entmax 2.7": (lambda: Calls(lambda x: entmax(x, 2.7, dim=0)), (ROWS,)),
    "sparsemax": (lambda: Calls(lambda x: sparsemax(x)), (ROWS,)),
    "entmax of a tensor": (lambda: Calls(lambda x, y: entmax(x, 1 + y.sigmoid())), (ROWS, (3, 1))),
    "learnt alpha": (lambda: Entmax(1.4, learn_alpha=True), (ROWS,)),
    "topk": (lambda: Calls(lambda x: topk_softmax(x, 2)), (ROWS,)),
    "sparse_softmax": (lambda: Calls(lambda x: sparse_softmax(x, 3)), (ROWS,)),
    "normmax": (lambda: Calls(lambda x: normmax(x)), (ROWS,)),
    "budget_sparsemax": (lambda: Calls(lambda x: budget_sparsemax(x, 1.7)), (ROWS,)),
    "loss": (lambda: Calls(lambda x: entmax_loss(x, TARGET, 2.0, reduction="none")), (ROWS,)),
    "loss of probabilities": (
        lambda: Calls(lambda x, y: entmax_loss(x, y.softmax(-1), reduction="none")),
        (ROWS, ROWS),
    ),
    "attention": (lambda: Calls(lambda q, k, v: entmax_attention(q, k, v)), (HEADS,) * 3),
    "long attention": (lambda: Calls(lambda q: entmax_attention(q, q, q, is_causal=True)), ((1, 521, 3),)),
    "long top-k attention": (lambda: Calls(lambda q: topk_attention(q, q, q, 2)), ((1, 521, 3),)),
    "attention without projections": (lambda: SparseAttention(k=2, alpha=1.5), (HEADS,) * 3),
    "encoder": (lambda: swapped(AdaptiveSparseMultiheadAttention, alpha_init=[1.0, 1.7]), ((2, 5, 6),)),
    "top-k encoder": (lambda: swapped(TopKMultiheadAttention, k=2), ((2, 5, 6),)),
}
Way = Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


def saved_by_jit(model: nn.Module, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs), file)
    file.seek(0)
    return torch.jit.load(file)(*others)


def onnx_by_jit(model: nn.Module, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    file = io.BytesIO()
    torch.onnx.export(model, inputs, file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [entry.name for entry in session.get_inputs()]
    assert len(names) == len(others)
    values = (x.numpy() for x in others)
    return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])


def fx(**kwargs: Any) -> Way:
    return lambda model, inputs, others: make_fx(model, _allow_non_fake_inputs=True, **kwargs)(*inputs)(*others)


def fx_of_vmap(model: nn.Module, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    twice = [tuple(torch.stack([x, x]) for x in some) for some in (inputs, others)]
    return make_fx(vmap(model))(*twice[0])(*twice[1])[1]


# "functionalize", "linearize" and "aot_module" trace when they are called, so they get only the other input.
WAYS: dict[str, Way] = {
    "jit": saved_by_jit,
    "onnx": onnx_by_jit,
    "make_fx": fx(),
    "make_fx, fake": fx(tracing_mode="fake"),
    "make_fx, symbolic": fx(tracing_mode="symbolic"),
    "make_fx, pre-dispatch": fx(pre_dispatch=True),
    "make_fx of vmap": fx_of_vmap,
    "make_fx of functionalize": lambda model, inputs, others: make_fx(functionalize(model))(*inputs)(*others),
    "functionalize": lambda model, inputs, others: functionalize(model)(*others),
    "linearize": lambda model, inputs, others: linearize(model, *others)[0],
    "aot_module": lambda model, inputs, others: aot_module(model, nop)(*others),
}
# Two very different tracers run every case; the other tracers run two cases.
PAIRS = [(case, way) for case in CASES for way in WAYS if way in ("onnx", "make_fx") or case in ("sparsemax", "topk")]
WITHOUT_ONNX = ("loss", "loss of probabilities")


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_a_graph_computes_the_same_values_for_other_input(case: str, way: str) -> None:
    make, shapes = CASES[case]
    model, inputs, others = make(), *(tuple(torch.randn(shape) for shape in shapes) for _ in range(2))
    if way == "onnx" and case in WITHOUT_ONNX:
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="expm1"):
            onnx_by_jit(model, inputs, others)
        return
    with torch.no_grad():
        expected, got = model(*others), WAYS[way](model, inputs, others)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_backend("torch", "compiled", "triton")
@pytest.mark.parametrize("way", ["jit", "onnx", "make_fx", "make_fx, pre-dispatch", "functionalize"])
def test_with_a_forced_backend_a_graph_computes_the_same_values(backend: str, way: str) -> None:
    def several(x: Tensor, q: Tensor) -> Tensor:
        mapped = torch.cat([sparsemax(x), topk_softmax(x, 2), entmax_attention(q, q, q)])
        return mapped.cumsum(0)

    inputs, others = ((torch.randn(5, 7), torch.randn(3, 7)) for _ in range(2))
    with use_backend(backend):
        got = WAYS[way](Calls(several), inputs, others)
    torch.testing.assert_close(got, several(*others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["sparsemax", "topk", "loss", "long attention"])
def test_the_derivatives_in_a_graph_equal_those_of_the_call(case: str) -> None:
    make, shapes = CASES[case]
    model, (first, *inputs), (other, *others) = make(), *([torch.randn(s) for s in shapes] for _ in range(2))
    model.requires_grad_(False).double()
    first, other, inputs, others = first.double(), other.double(), *([x.double() for x in s] for s in (inputs, others))
    with torch.no_grad():
        upstream = torch.randn_like(model(other, *others))

    def gradient(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (model(x, *rest) * upstream).sum())(x)

    expected = gradient(other, *others)
    torch.testing.assert_close(make_fx(gradient)(first, *inputs)(other, *others), expected)
    traced = torch.jit.trace(model, (first, *inputs))
    leaf = other.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad((traced(leaf, *others) * upstream).sum(), leaf)[0], expected)
    tangent = torch.randn_like(other)
    along = linearize(lambda x: model(x, *others), other)[1](tangent)
    torch.testing.assert_close((along * upstream).sum(), (expected * tangent).sum())


def test_a_learnt_alpha_can_be_trained_in_a_trace() -> None:
    layer, x = Entmax(1.4, learn_alpha=True), torch.randn(3, 5)
    traced, upstream = torch.jit.trace(layer, (torch.randn(3, 5),)), torch.randn(3, 5)
    gradients = [torch.autograd.grad((f(x) * upstream).sum(), layer.raw_alpha)[0] for f in (traced, layer)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"window": 3},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"num_kv_heads": 1},
    ],
    ids=["window", "extra keys", "grouped heads"],
)
def test_a_traced_layer_accepts_other_batches_and_lengths(kwargs: dict[str, Any]) -> None:
    layer = TopKMultiheadAttention(8, 2, k=7, batch_first=True, **kwargs).eval()
    model = Calls(lambda x: layer(x, x, x, is_causal=True)[0])
    layer.requires_grad_(False)
    traced = torch.jit.trace(model, (torch.randn(2, 11, 8),))
    for shape in ((3, 5, 8), (1, 17, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


def test_tracing_packed_sequences_raises_an_error() -> None:
    starts = torch.tensor([0, 2, 5])
    model = Calls(lambda x, starts: entmax_attention_varlen(x, x, x, starts, starts))
    with pytest.raises(RuntimeError, match="lengths would become constants"):
        torch.jit.trace(model, (torch.randn(5, 2, 7), starts))


class Block(nn.Module):
    """A block as in vision models: it calls attention with keyword arguments and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.weights = Entmax(1.4, learn_alpha=True)
        self.core = SparseAttention(k=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, value=y, need_weights=False)
        return x + self.core(y, y, y) * self.weights(y)


def test_symbolic_tracing_takes_layers_as_leaves() -> None:
    block, x = Block(), torch.randn(2, 5, 6)
    replace_attention(block)
    traced = torch.fx.symbolic_trace(block)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["norm", "attention", "core", "weights"]
    assert torch.equal(traced(x), block(x))
    assert torch.equal(copy.deepcopy(traced)(x), block(x))


def test_features_can_be_extracted_from_a_symbolic_trace() -> None:
    block, x = Block(), torch.randn(2, 5, 6)
    replace_attention(block)
    traced = torch.fx.symbolic_trace(block)
    (attention,) = (node for node in traced.graph.nodes if node.target == "attention")
    for node in reversed(traced.graph.nodes):
        if node.op == "output":
            node.args = (attention,)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    normed = block.norm(x)
    torch.testing.assert_close(traced(x)[0], block.attention(normed, normed, normed)[0])
