"""Attention with capped scores and with sinks, compared with a formula in float64, gradients included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparse_attn import (
    backends,
    entmax,
    entmax_attention,
    entmax_attention_varlen,
    topk_attention,
    topk_softmax,
    use_backend,
)
from sparse_attn.ops.attention import ScoreMapping, attend

BACKENDS = [name for name in ("compiled", "torch") if not backends()[name].startswith("not")]
N, H, HK, D, DV = 2, 6, 2, 5, 3
CAP = 0.7  # below the size of most scores, so that the cap has an effect
OPTIONS = [{"softcap": CAP}, {"sinks": True}, {"softcap": CAP, "sinks": True}]
# Large calls are computed in blocks, with two exceptions. The compiled backend computes calls without a
# soft-cap in its C kernel. Calls with both a soft-cap and sinks are computed as one matrix.
SIZES = {"small": (7, 11), "large": (521, 523)}


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"query": (N, H, queries, D), "key": (N, HK, keys, D), "value": (N, HK, keys, DV), "sinks": (H,)}
    drawn = {name: torch.randn(shape, dtype=torch.float64) * 1.3 for name, shape in shapes.items()}
    drawn["alpha"] = torch.tensor([1.0, 1.1, 1.4, 1.5, 1.7, 2.0], dtype=torch.float64)
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}


def formula(
    tensors: dict[str, Tensor], options: dict[str, Any], mask: Tensor | None, k: int | None
) -> tuple[Tensor, Tensor]:
    """Output and weights with a matrix of scores, the sink as its last column."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    key, value = key.repeat_interleave(H // HK, 1), value.repeat_interleave(H // HK, 1)
    scores = query @ key.mT / math.sqrt(D)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if "sinks" in options:
        scores = torch.cat([scores, tensors["sinks"].view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = entmax(scores, tensors["alpha"].view(-1, 1, 1)) if k is None else topk_softmax(scores, k)
    weights = weights[..., : key.shape[-2]]
    return weights @ value, weights


def called(tensors: dict[str, Tensor], options: dict[str, Any], k: int | None = None, **more: Any) -> Tensor:
    """The output of `entmax_attention`, or of `topk_attention` if ``k`` is given."""
    options = options | more | {"enable_gqa": True}
    if "sinks" in options:
        options["sinks"] = tensors["sinks"]
    qkv = [tensors[name] for name in ("query", "key", "value")]
    return entmax_attention(*qkv, tensors["alpha"], **options) if k is None else topk_attention(*qkv, k, **options)


def masks(queries: int, keys: int) -> dict[str, tuple[dict[str, Any], Tensor | None]]:
    """Arguments of our function, and the mask of the formula."""
    visible = torch.rand(N, 1, queries, keys) < 0.6
    visible[0, 0, 1] = False  # only the sink is left
    added = torch.randn(H, 1, keys, dtype=torch.float64)
    causal = torch.ones(queries, keys, dtype=torch.bool)
    return {
        "none": ({}, None),
        "bool": ({"attn_mask": visible}, visible),
        "float (H, 1, S)": ({"attn_mask": added}, added),
        "bool (L, 1)": ({"attn_mask": visible[0, 0, :, :1]}, visible[0, 0, :, :1]),
        "causal": ({"is_causal": True}, causal.tril()),
        "lower right": ({"attn_mask": causal_lower_right(queries, keys)}, causal.tril(keys - queries)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float (H, 1, S)", "bool (L, 1)", "causal", "lower right"])
def test_softcap_and_sinks_equal_the_formula_with_gradients(mask, options, size, backend):
    if size == "large" and mask in ("bool (L, 1)", "lower right") and backend == "compiled":
        pytest.skip("other masks test long rows in the C kernel")
    tensors, (arguments, as_tensor) = inputs(*SIZES[size]), masks(*SIZES[size])[mask]
    used = [name for name in tensors if name != "sinks" or "sinks" in options]
    expected = formula(tensors, options, as_tensor, None)[0]
    with use_backend(backend):
        got = called(tensors, options, **arguments)
        upstream = torch.randn_like(expected)
        gradients = [torch.autograd.grad(x, [tensors[name] for name in used], upstream) for x in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for name, actual, wanted in zip(used, *gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_k_largest_of_keys_and_sink(options, size, backend):
    tensors, causal = inputs(*SIZES[size]), torch.ones(SIZES[size], dtype=torch.bool).tril()
    expected = formula(tensors, options, causal, 4)[0]
    with use_backend(backend):
        got = called(tensors, options, 4, is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if "sinks" in options and size == "small":
        kept = (formula(tensors, options, None, 4)[1] > 0).sum(-1)
        assert set(kept.unique().tolist()) == {3, 4}  # the sink can be one of the k largest


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_returned_weights_are_those_of_the_keys(options):
    tensors = inputs(7, 11)
    used = {**options, "sinks": tensors["sinks"]} if "sinks" in options else options
    mapping = ScoreMapping(tensors["alpha"])
    output, weights = attend(*(tensors[name] for name in ("query", "key", "value")), mapping, enable_gqa=True, **used)
    for actual, wanted in zip((output, weights), formula(tensors, options, None, None), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)
    assert ("sinks" in options) == bool((weights.sum(-1) < 0.999).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives(options, backend):
    query, key, value = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (2, 2, 3))
    sinks, alpha = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.2, -0.4], [1.3, 1.8]))

    def call(*tensors: Tensor) -> Tensor:
        used = {**options, "sinks": tensors[4]} if "sinks" in options else options
        return entmax_attention(*tensors[:4], **used)

    tensors = (query, key, value, alpha, *([sinks] if "sinks" in options else []))
    with use_backend(backend):
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


def test_second_derivatives_in_blocks():
    query, key, value = (torch.randn(1, 523, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gradients = []
    # A call whose mask needs a gradient is computed as one matrix instead of in blocks.
    for mask in (None, torch.zeros(523, 523, dtype=torch.float64, requires_grad=True)):
        with use_backend("torch"):
            output = entmax_attention(query, key, value, 1.5, mask, softcap=CAP)
        first = torch.autograd.grad(output.square().sum(), query, create_graph=True)[0]
        gradients.append(torch.autograd.grad(first.square().sum(), (query, key, value)))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_half_precision_and_autocast(dtype, options, backend):
    tensors = inputs(7, 11, dtype)
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    with use_backend(backend):
        got = called(tensors, options)
        assert got.dtype == dtype
        torch.testing.assert_close(got, formula(wide, options, None, None)[0].to(dtype))
        for autocast in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast):
                assert called(inputs(7, 11, torch.float32), options).dtype == autocast


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode calls this function
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_vmapped_and_in_forward_mode(options):
    tensors = {name: x.detach() for name, x in inputs(7, 11).items()}
    expected = formula(tensors, options, None, None)[0]
    torch.compiler.reset()
    compiled = torch.compile(lambda tensors: called(tensors, options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), expected)
    moved = {name: 0 if name in ("query", "key", "value") else None for name in tensors}
    torch.testing.assert_close(torch.func.vmap(lambda x: called(x, options), in_dims=(moved,))(tensors), expected)
    name = "sinks" if "sinks" in options else "query"
    tangent = torch.randn_like(tensors[name])
    along = [
        torch.func.jvp(lambda x, of=of: of({**tensors, name: x}), (tensors[name],), (tangent,))[1]
        for of in (lambda x: called(x, options), lambda x: formula(x, options, None, None)[0])
    ]
    torch.testing.assert_close(*along)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_sequences(dtype, options, is_causal, backend):
    lengths_q, lengths_k = (5, 0, 7, 1), (3, 2, 0, 13)
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    tensors = inputs(7, 11)
    query, key, value = (
        torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((13, H, D), (18, HK, D), (18, HK, DV))
    )
    used = {**options, "sinks": tensors["sinks"]} if "sinks" in options else options
    used |= {"is_causal": is_causal, "enable_gqa": True}
    inexact = [query, key, value, tensors["alpha"], *([tensors["sinks"]] if "sinks" in options else [])]
    with use_backend(backend):
        got = entmax_attention_varlen(query, key, value, *starts, tensors["alpha"], **used)
        parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
        single = [entmax_attention(*(x.transpose(0, 1) for x in part), tensors["alpha"], **used) for part in parts]
        expected = torch.cat(single, 1).transpose(0, 1)
        assert got.dtype == dtype
        upstream = torch.randn_like(expected)
        bound = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(got, expected, **bound)
        for actual, wanted in zip(*(torch.autograd.grad(x, inexact, upstream) for x in (got, expected)), strict=True):
            torch.testing.assert_close(actual, wanted, **bound)


def test_one_head_without_a_head_axis_and_a_masked_sink():
    query, key, value = (torch.randn(size, 5) for size in (3, 7, 7))
    without = entmax_attention(query, key, value)
    torch.testing.assert_close(entmax_attention(query, key, value, sinks=torch.tensor([-math.inf])), without)
    torch.testing.assert_close(entmax_attention(query, key, value, sinks=torch.tensor([1e4])), torch.zeros(3, 5))
    torch.testing.assert_close(entmax_attention(query, key, value, softcap=1e4), without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 0}, ValueError, r"softcap must be in \(0, inf\), got 0"),
        ({"softcap": -1.0}, ValueError, r"softcap must be in \(0, inf\), got -1.0"),
        ({"softcap": math.inf}, ValueError, r"softcap must be in \(0, inf\), got inf"),
        ({"softcap": math.nan}, ValueError, r"softcap must be in \(0, inf\), got nan"),
        ({"softcap": True}, TypeError, "softcap must be a number, got True"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \(H,\) = \(2,\), got \(3,\)"),
        ({"sinks": torch.zeros(2, 1, 1)}, ValueError, r"sinks must have shape \(H,\) = \(2,\), got \(2, 1, 1\)"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, TypeError, "sinks must have a floating dtype"),
        ({"sinks": 0.5}, TypeError, "sinks must be a torch.Tensor, got float"),
        ({"sinks": torch.zeros(2, device="meta")}, ValueError, "sinks must be on the query's device, cpu, got meta"),
    ],
)
def test_invalid_input_raises_an_error(options, error, message):
    x, starts = torch.randn(2, 3, 5), torch.tensor([0, 3])
    with pytest.raises(error, match=message):
        entmax_attention(x, x, x, **options)
    with pytest.raises(error, match=message):
        topk_attention(x, x, x, 2, **options)
    with pytest.raises(error, match=message):
        entmax_attention_varlen(*[x.transpose(0, 1)] * 3, starts, starts, **options)


def test_packed_lengths_are_checked_with_sinks():
    x = torch.randn(3, 2, 5)
    for starts, message in (
        (torch.tensor([0, 4]), "must end with the total length 3"),
        (torch.tensor([1, 3]), "begin"),
    ):
        with pytest.raises(ValueError, match=message):
            entmax_attention_varlen(x, x, x, starts, starts, sinks=torch.zeros(2))
