"""Kernels get the window and causality of a layer as bounds: results equal those with a mask. Compiled code has no
unused matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blocks import E, H, N, layer_of, short
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import KVCache, TopKMultiheadAttention, use_backend
from sparse_attn.kernels import triton
from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.functions import blockwise
from sparse_attn.nn import multihead

# Warnings of Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = ["compiled", "blocks", "one matrix", "triton"]
CASES: list[dict[str, Any]] = [
    {"window": 3},
    {"window": (4, 0)},
    {"window": (0, 2), "num_kv_heads": 2},
    {"window": (None, 1), "qk_norm": True},
    {"window": (5, None), "positions": "rotary"},
    {"window": (4, 1), "positions": "alibi"},
    {"window": None},
]


@contextmanager
def computed_by(backend: str, monkeypatch: pytest.MonkeyPatch, *, block: int = 4) -> Iterator[None]:
    if backend == "compiled" and not rows.available():
        pytest.skip("no compiled kernels")
    if backend == "triton" and not triton.available():
        pytest.skip(triton.status()[1])
    with monkeypatch.context() as patch, use_backend(backend if backend in ("compiled", "triton") else "torch"):
        patch.setattr(choose, "_LARGE", 0 if backend == "blocks" else 2**60)
        patch.setattr(blockwise, "_QUERIES", block)
        yield


@contextmanager
def bounds_in_the_mask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    build = multihead.multihead_mask
    with monkeypatch.context() as patch:
        patch.setattr(
            multihead, "multihead_mask", lambda *args, **kw: build(*args, **{**kw, "with_bounds_apart": False})
        )
        yield


def run(layer: Any, call: Callable[[Any], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of the inputs and of all parameters."""
    inputs = [*inputs, *layer.parameters()]
    output = call(layer)
    return [output, *torch.autograd.grad(output, inputs, torch.linspace(-1, 1, output.numel()).sin().view_as(output))]


def compare(layer: Any, call: Callable[[Any], Tensor], inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the results with those of one matrix of scores, whose mask contains the bounds."""
    got = run(layer, call, inputs)
    with computed_by("one matrix", monkeypatch), bounds_in_the_mask(monkeypatch):
        wanted = run(layer, call, inputs)
    for actual, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, right, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("masks", "is_causal"), [("none", True), ("padding", False), ("padding", True), ("float", True)]
)
@pytest.mark.parametrize("options", CASES, ids=short)
def test_bounds_equal_a_mask(options, is_causal, masks, backend, monkeypatch):
    if backend == "triton" and (masks != "padding" or is_causal):
        pytest.skip("the interpreter is slow")
    layer = layer_of(options, dtype=torch.float32)
    x = torch.randn(N, 11, E, requires_grad=True)
    inputs, given = [x], {}
    if masks == "padding":
        given["key_padding_mask"] = torch.arange(11) >= torch.tensor([[9], [4]])
    if masks == "float":
        given["position_bias"] = torch.randn(H, 11, 11, requires_grad=True)
        inputs.append(given["position_bias"])

    def call(layer: Any) -> Tensor:
        return layer(x, x, x, need_weights=False, is_causal=is_causal, **given)[0]

    with computed_by(backend, monkeypatch):
        compare(layer, call, inputs, monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["α per head", "top-k", "padding with NaN"])
def test_bounds_beside_other_arguments(kind, backend, monkeypatch):
    if kind == "top-k":
        layer = layer_of({"window": (6, 2)}, TopKMultiheadAttention, dtype=torch.float32)
    else:
        layer = layer_of({"window": (6, 2)}, dtype=torch.float32)
        layer.raw_alpha.data = torch.linspace(1.0, 2.0, H)
    x = torch.randn(N, 13, E, requires_grad=True)
    padded = torch.arange(13) >= torch.tensor([[13], [5]])
    spoilt = torch.where(padded[:, :, None], torch.nan, x.detach()) if kind == "padding with NaN" else x

    def call(layer: Any, key: Tensor = spoilt) -> Tensor:
        return layer(x, key, key, key_padding_mask=padded, need_weights=False)[0]

    with computed_by(backend, monkeypatch):
        if kind != "padding with NaN":
            compare(layer, call, [x], monkeypatch)
            return
        torch.testing.assert_close(call(layer), call(layer, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["compiled", "blocks", "one matrix"])
@pytest.mark.parametrize("options", CASES, ids=short)
def test_decoding_with_a_cache_equals_all_positions_at_once(options, backend, monkeypatch):
    layer = layer_of(options)
    x = torch.randn(N, 23, E, dtype=torch.float64)
    wanted = layer(x, x, x, is_causal=True)[0]
    cache, outputs = KVCache(), []
    with computed_by(backend, monkeypatch):
        for part in x.split([9, 1, 1, 7, 5], 1):
            outputs.append(layer(part, part, part, is_causal=True, need_weights=False, cache=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, 1), wanted)


@pytest.mark.parametrize(
    ("window", "same"), [(2**62, (None, None)), ((2**80, 0), (None, 0)), ((3, 2**63 - 1), (3, None))]
)
def test_a_window_may_be_wider_than_any_sequence(window, same):
    layer, other = layer_of({"window": window}), layer_of({"window": same})
    other.load_state_dict(layer.state_dict())
    x, outputs = torch.randn(N, 7, E, dtype=torch.float64), []
    for one in (layer, other):
        cache = KVCache()
        parts = [one(part, part, part, need_weights=False, cache=cache)[0] for part in x.split([2, 5], 1)]
        outputs.append(torch.cat(parts, 1))
    torch.testing.assert_close(*outputs)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries in the largest storage of the tensors that operations return."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


LENGTH = 2003


@pytest.mark.parametrize("backend", ["compiled", "blocks"])
@pytest.mark.parametrize(("is_causal", "padded"), [(False, False), (True, True)])
def test_no_tensor_has_the_size_of_the_scores(padded, is_causal, backend, monkeypatch):
    layer = layer_of({"window": (50, 3)}, dtype=torch.float32)
    x = torch.randn(1, LENGTH, E, requires_grad=True)
    mask = torch.arange(LENGTH)[None] >= LENGTH - 100 if padded else None

    def step() -> int:
        with LargestTensor() as largest:
            layer(x, x, x, mask, need_weights=False, is_causal=is_causal)[0].sum().backward()
        return largest.entries

    with computed_by(backend, monkeypatch, block=256):
        assert 0 < step() < LENGTH**2 // 2
        with bounds_in_the_mask(monkeypatch):
            assert step() >= LENGTH**2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
def test_compiled_code_has_no_mask_of_all_scores():
    if not rows.available():
        pytest.skip("no compiled kernels")
    layer = layer_of({"window": (5, 0)}, dtype=torch.float32)
    x = torch.randn(N, 37, E, requires_grad=True)
    sizes: list[int] = []

    def keep_sizes(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        sizes.extend(
            value.numel()
            for node in graph.graph.nodes
            for value in tree_leaves(node.meta.get("example_value"))
            if isinstance(value, Tensor) and value.dtype == torch.bool
        )
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=keep_sizes)
    padded = torch.arange(37) >= torch.tensor([[37], [30]])

    def call(layer: Any) -> Tensor:
        return layer(x, x, x, padded, need_weights=False, is_causal=True)[0]

    for actual, right in zip(run(layer, lambda _: call(compiled), [x]), run(layer, call, [x]), strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-4)
    assert sizes and max(sizes) <= N * 37


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
@pytest.mark.parametrize("options", [{}, {"window": (5, 0)}], ids=short)
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_code_has_no_matrix_of_weights_that_the_caller_drops(is_causal, options):
    if not rows.available():
        pytest.skip("no compiled kernels")
    layer = layer_of(options, dtype=torch.float32)
    x = torch.randn(N, 37, E, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def keep_shapes(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        values = [value for node in graph.graph.nodes for value in tree_leaves(node.meta.get("val"))]
        shapes.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))
        return make_boxed_func(graph.forward)

    def call(layer: Any) -> Tensor:
        return layer(x, x, x, is_causal=is_causal)[0]  # need_weights=True, as in torch's layer

    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep_shapes))
    for actual, right in zip(run(layer, compiled, [x]), run(layer, call, [x]), strict=True):
        torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-4)
    assert shapes and all(shape[-2:] != (37, 37) for shape in shapes)

    def call_with_weights(layer: Any) -> list[Tensor]:
        return list(layer(x, x, x, is_causal=is_causal))

    actual, right = torch.compile(call_with_weights, backend="aot_eager")(layer), call_with_weights(layer)
    torch.testing.assert_close(actual, right, atol=1e-5, rtol=1e-4)
