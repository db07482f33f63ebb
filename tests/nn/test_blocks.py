"""Grouped heads, windows, norms, positions and scaling, alone and combined: compared with loops, compiled, copied."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product
from typing import Any

import numpy
import pytest
import torch
from blocks import ALONE, TOGETHER, D, E, H, N, S, T, layer_of, short
from entmax import entmax_bisect
from torch import Tensor, nn

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    ALiBi,
    KVCache,
    RotaryPositions,
    TopKMultiheadAttention,
    use_backend,
    versions,
)
from sparse_attn.kernels.functions import blockwise
from sparse_attn.nn import SparseMultiheadAttention


def by_hand(layer: SparseMultiheadAttention, query: Tensor, memory: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights for α = 1.5, by loops over heads and queries.

    `visible` (N, L, S) holds only the masks; this function applies the window.
    """
    groups, positions = layer.num_heads // layer.num_kv_heads, layer.positions
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    if "in_proj_weight" in state:
        w_q, w_k, w_v = state["in_proj_weight"].split(E)
        b_q, b_k, b_v = state["in_proj_bias"].split(E)
    else:
        w_q, w_k, w_v = (state[f"{letter}_proj_weight"] for letter in "qkv")
        b_q, b_k, b_v = state["in_proj_bias"].split([len(w) for w in (w_q, w_k, w_v)])

    def prepared(x: Tensor, norm: str, place: int) -> Tensor:
        if norm in state:
            x = x / (x.square().mean() + 1e-6).sqrt() * state[norm]
        if isinstance(positions, RotaryPositions):
            z = torch.complex(x[: D // 2], x[D // 2 :])
            z = z * torch.exp(1j * place * 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D))
            x = torch.cat([z.real, z.imag])
        return x

    output = torch.zeros(len(query), query.shape[1], E, dtype=torch.float64)
    weights = torch.zeros(len(query), H, query.shape[1], memory.shape[1], dtype=torch.float64)
    left, right = layer.window or (None, None)
    for n, h, i in product(range(len(query)), range(H), range(query.shape[1])):
        rows, group = slice(h * D, (h + 1) * D), h // groups
        kv_rows = slice(group * D, (group + 1) * D)
        q = prepared(w_q[rows] @ query[n, i] + b_q[rows], "q_norm.weight", i)
        seen = [
            j
            for j in range(memory.shape[1])
            if visible[n, i, j] and (left is None or j >= i - left) and (right is None or j <= i + right)
        ]
        if not seen:
            continue
        if layer.length_scaling is not None:
            q = q * layer.length_scaling(query[n, None, i, None], torch.tensor(len(seen)))[0, h, 0, 0].detach()
        scores = []
        for j in seen:
            k = prepared(w_k[kv_rows] @ memory[n, j] + b_k[kv_rows], "k_norm.weight", j)
            bias = -float(positions.slopes(torch.float64)[h]) * abs(i - j) if isinstance(positions, ALiBi) else 0.0
            scores.append(q @ k / math.sqrt(D) + bias)
        p = entmax_bisect(torch.stack(scores), 1.5, n_iter=60)
        weights[n, h, i, seen] = p
        output[n, i, rows] = sum(p[m] * (w_v[kv_rows] @ memory[n, j] + b_v[kv_rows]) for m, j in enumerate(seen))
    return output @ state["out_proj.weight"].T + state["out_proj.bias"], weights


@pytest.mark.parametrize("options", [*ALONE, TOGETHER, {**TOGETHER, "positions": "rotary"}], ids=short)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_output_and_weights_equal_loops(options: dict[str, Any], cross: bool) -> None:
    layer = layer_of(options)
    query = torch.randn(N, T, E, dtype=torch.float64)
    memory = torch.randn(N, S, E, dtype=torch.float64) if cross else query
    keys = memory.shape[1]
    masked = torch.rand(T, keys) < 0.2
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[1, :2] = True
    visible = ~masked & ~padding[:, None]
    masks = {"attn_mask": masked, "key_padding_mask": padding}
    output, weights = layer(query, memory, memory, average_attn_weights=False, **masks)
    expected_output, expected_weights = by_hand(layer, query, memory, visible)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(output, expected_output, rtol=1e-8, atol=1e-9)
    without = layer(query, memory, memory, need_weights=False, **masks)[0]
    torch.testing.assert_close(without, output, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [*ALONE, TOGETHER, {**TOGETHER, "positions": "rotary"}], ids=short)
def test_gradients_equal_finite_differences(options: dict[str, Any]) -> None:
    layer = layer_of(options, alpha_init=1.4)
    memory = torch.randn(1, S, E, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def run(query: Tensor, memory: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, state, (query, memory, memory))[0]

    query = torch.randn(1, 3, E, dtype=torch.float64)
    leaves = (query.requires_grad_(), memory.requires_grad_(), *parameters.values())
    # `fast_mode` checks one random direction: the full Jacobian, for about 15000 numbers, would take minutes.
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("options", [*ALONE, TOGETHER], ids=short)
def test_blocks_of_queries_equal_one_large_matrix(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(options)
    x = torch.randn(N, T, E, dtype=torch.float64)
    calls, in_blocks = [], choose.blockwise_attention
    monkeypatch.setattr(choose, "blockwise_attention", lambda *args: calls.append(1) or in_blocks(*args))
    monkeypatch.setattr(blockwise, "_QUERIES", 3)
    outcomes = []
    for large in (2**20, 1):
        monkeypatch.setattr(choose, "_LARGE", large)
        with use_backend("torch"):  # with the compiled backend, the C kernel would compute both calls
            output = layer(x, x, x, is_causal=True, need_weights=False)[0]
            outcomes.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    assert len(calls) == 1
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-10)


# torch's tracer builds an autograd function in a deprecated way and warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [TOGETHER, {"num_kv_heads": 2, "qk_norm": True, "positions": "rotary"}], ids=short)
def test_the_layer_compiles_into_one_graph(options: dict[str, Any], need_weights: bool) -> None:
    layer = layer_of(options)
    x = torch.randn(N, T, E, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(layer: Any) -> list[Tensor]:
        output = layer(x, x, x, is_causal=True, need_weights=need_weights)[0]
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    torch.testing.assert_close(run(compiled), run(layer), rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(
    (2, 9) <= versions.TORCH < (2, 13),
    reason="the export of torch 2.9 to 2.12 cannot compare two multiples of one symbolic length",
)
def test_an_exported_layer_takes_another_length() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer_of(TOGETHER, dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x, is_causal=True, need_weights=False)[0]

    model, some = Causal().eval(), torch.export.Dim("some", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(N, T, E),), dynamic_shapes=({1: some},)).module()
    x = torch.randn(N, 11, E)
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [TOGETHER, {"num_kv_heads": 2, "positions": "rotary"}], ids=short)
def test_gradients_per_example_equal_separate_gradients(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        inputs = (x[None],) * 3
        return torch.func.functional_call(layer, parameters, inputs, {"is_causal": True})[0].square().sum()

    x = torch.randn(N, T, E, dtype=torch.float64)
    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for n in range(N):
        single = torch.autograd.grad(loss(parameters, x[n]), list(parameters.values()))
        for name, grad in zip(parameters, single, strict=True):
            torch.testing.assert_close(batched[name][n], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [TOGETHER, {"num_kv_heads": 2, "positions": "rotary"}], ids=short)
def test_new_tensors_are_created_on_the_device_of_the_layer(options: dict[str, Any]) -> None:
    layer = layer_of(options).to("meta")
    x, cache = torch.randn(N, T, E, dtype=torch.float64, device="meta"), KVCache()
    for _ in range(2):
        assert layer(x, x, x, is_causal=True, cache=cache)[0].is_meta


@pytest.mark.parametrize("options", [*ALONE, TOGETHER], ids=short)
def test_copied_pickled_and_loaded_layers_give_the_same_output(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    x = torch.randn(N, T, E, dtype=torch.float64)
    expected = layer(x, x, x, is_causal=True)
    again = layer_of(options)
    again.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again):
        torch.testing.assert_close(other(x, x, x, is_causal=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [*ALONE, TOGETHER, {**TOGETHER, "positions": "rotary"}], ids=short)
def test_half_precision_and_autocast_are_close_to_float64_and_keep_their_dtype(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = layer_of(options)
    x = torch.randn(N, T, E, dtype=torch.float64)
    expected = layer(x, x, x, is_causal=True)[0]
    half = copy.deepcopy(layer).to(dtype)
    cache = KVCache()
    output = half(*[x.to(dtype)] * 3, is_causal=True, cache=cache)[0]
    assert output.dtype == cache.key.dtype == cache.value.dtype == dtype
    assert (output.double() - expected).abs().max() < 0.05 * expected.abs().max()
    wide = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = wide(*[x.float()] * 3, is_causal=True)[0]
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_query_whose_window_contains_no_key_gets_zero_weights() -> None:
    layer = layer_of({"window": (1, 0), "length_scaling": True})
    query, memory = torch.randn(N, T, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    output, weights = layer(query, memory, memory)
    assert weights[:, S + 1 :].eq(0).all() and bool(weights[:, S].ne(0).any())
    torch.testing.assert_close(output[:, -1], layer.out_proj.bias.expand(N, E), rtol=0, atol=0)


def test_unbatched_and_length_first_input_give_the_same_output() -> None:
    layer = layer_of(TOGETHER)
    x = torch.randn(N, T, E, dtype=torch.float64)
    expected = layer(x, x, x, is_causal=True)[0]
    torch.testing.assert_close(layer(x[0], x[0], x[0], is_causal=True)[0], expected[0], rtol=1e-9, atol=1e-12)
    length_first = layer_of(TOGETHER, batch_first=False)
    length_first.load_state_dict(layer.state_dict())
    turned = x.transpose(0, 1)
    output = length_first(turned, turned, turned, is_causal=True)[0]
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=1e-9, atol=1e-12)


def test_extra_keys_of_the_layer_have_no_position() -> None:
    layer = layer_of({**TOGETHER, "positions": "alibi", "window": (0, 0)}, add_zero_attn=True, alpha_init=1.0)
    x = torch.randn(N, T, E, dtype=torch.float64)
    weights = layer(x, x, x, average_attn_weights=False)[1]
    assert weights.shape == (N, H, T, T + 1)
    own = weights[..., :T].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(own + weights[..., T], torch.ones(N, H, T, dtype=torch.float64))
    assert bool((weights[..., T] > 0).all())


@pytest.mark.parametrize("shape", [(), (1,), (H, 1, 1), (T, 1), (T,), (N, 1, T, T)], ids=str)
def test_a_bias_is_broadcast_to_the_scores(shape: tuple[int, ...]) -> None:
    layer = layer_of({"length_scaling": True}, add_bias_kv=True, add_zero_attn=True)
    x, bias = torch.randn(N, T, E, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    full = bias.expand(N, H, T, T).contiguous()
    expected = layer(x, x, x, position_bias=full)
    torch.testing.assert_close(layer(x, x, x, position_bias=bias), expected, rtol=1e-12, atol=1e-12)


def test_repr_shows_the_arguments_that_torch_does_not_have() -> None:
    layer = TopKMultiheadAttention(E, H, k=2, num_kv_heads=3, window=4)
    assert layer.extra_repr() == "k=2, normalizer='softmax', num_kv_heads=3, window=(4, 4)"
    assert AdaptiveSparseMultiheadAttention(E, H, window=(4, None)).extra_repr().endswith("=True, window=(4, None)")


def test_a_window_may_have_ints_of_numpy() -> None:
    layer, x = AdaptiveSparseMultiheadAttention(E, H, window=3).eval(), torch.randn(7, 2, E)
    expected = layer(x, x, x)[0]
    for window in (numpy.int64(3), (numpy.int64(3), 3)):
        other = AdaptiveSparseMultiheadAttention(E, H, window=window).eval()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x, x, x)[0], expected)


WINDOW = "window must be an int of at least 1, or a pair .left, right., each None or an int of at least 0, got "


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_kv_heads": 4}, ValueError, "num_kv_heads must be a divisor of num_heads, 6, got 4"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be a divisor of num_heads, 6, got 0"),
        ({"num_kv_heads": 12}, ValueError, "num_kv_heads must be a divisor of num_heads, 6, got 12"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int, got 2.0"),
        ({"window": 0}, ValueError, WINDOW + "0"),
        ({"window": -2}, ValueError, WINDOW + "-2"),
        ({"window": (3, -1)}, ValueError, WINDOW + r"\(3, -1\)"),
        ({"window": 2.5}, TypeError, WINDOW + "2.5"),
        ({"window": (1, 2, 3)}, TypeError, WINDOW + r"\(1, 2, 3\)"),
        ({"window": True}, TypeError, WINDOW + "True"),
    ],
)
@pytest.mark.parametrize("kind", [AdaptiveSparseMultiheadAttention, TopKMultiheadAttention])
def test_an_invalid_argument_raises_an_error(
    kind: type[SparseMultiheadAttention], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(E, H, **kwargs, **({"k": 2} if kind is TopKMultiheadAttention else {}))
