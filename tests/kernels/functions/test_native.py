"""Attention in C equals attention with one matrix of scores in float64, including gradients."""

from __future__ import annotations

import math
import os
import threading

import pytest
import torch
from old_torch import since_torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import entmax_attention, topk_attention, use_backend
from sparse_attn.kernels.cpu import attention, rows
from sparse_attn.kernels.functions import native
from sparse_attn.kernels.setting import Setting

pytestmark = pytest.mark.skipif(not rows.available(), reason="no compiled kernels")

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def run(attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs, for an upstream gradient that depends only on the shape."""
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


def plain_attention(*qkv: Tensor, setting: Setting, seed: Tensor | None = None) -> Tensor:
    return native.plain_attention(native.Tensors(*qkv, None, None, seed, None, None), setting)


def tensors(
    dtype: torch.dtype, queries: int = 61, keys: int = 67, *, heads: int = 3, kv_heads: int = 3, sizes=(5, 7)
) -> list[Tensor]:
    shapes = ((heads, queries, sizes[0]), (kv_heads, keys, sizes[0]), (kv_heads, keys, sizes[1]))
    return [torch.randn(2, *shape, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    lengths = torch.tensor([keys, keys // 2 + 1]).view(2, 1, 1, 1)
    holes = torch.rand(2, 1, 1, keys) > 0.3
    return {
        "none": None,
        "causal": None,
        "padding": torch.arange(keys) < lengths,
        "padding in front": torch.arange(keys) >= keys - lengths,
        "holes": holes,
        "boolean": torch.rand(2, 1, queries, keys) > 0.3,
        "one for each query": torch.rand(3, queries, 1) > 0.2,
        "float": torch.randn(queries, keys, dtype=torch.float64),
        "float for each key": torch.randn(keys, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("queries", "keys"), [(61, 67), (67, 13), (1, 1), (3, 131), (29, 331)])
@pytest.mark.parametrize("mask", list(masks(2, 2)))
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, "per head", "top-k"])
def test_native_attention_equals_one_matrix(alpha, mask, queries, keys, dtype, monkeypatch):
    inputs = tensors(dtype, queries, keys)
    attn_mask = masks(queries, keys)[mask]
    if attn_mask is not None and attn_mask.is_floating_point():
        inputs.append(attn_mask.to(dtype))
    if alpha == "per head":
        inputs.append(torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64))

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        options: dict = {"is_causal": mask == "causal", "attn_mask": attn_mask}
        if attn_mask is not None and attn_mask.is_floating_point():
            options["attn_mask"] = rest[0]
        if alpha == "top-k":
            return topk_attention(query, key, value, 5, normalizer="sparsemax", **options)
        return entmax_attention(query, key, value, rest[-1] if alpha == "per head" else alpha, **options)

    compare(attend, inputs, monkeypatch)


def force(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = attention.forward, attention.backward
    monkeypatch.setattr(attention, "forward", lambda *args: forward(*args, variant=variant))
    monkeypatch.setattr(attention, "backward", lambda *args: backward(*args, variant=variant))


@pytest.mark.parametrize("variant", rows.variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (33, 40), (64, 128), (256, 3)])
def test_every_variant_and_head_size(sizes, dtype, variant, monkeypatch):
    force(variant, monkeypatch)
    alpha = torch.tensor([1.0, 1.1, 1.4, 1.5, 1.7, 2.0], dtype=torch.float64)
    inputs = [*tensors(dtype, 71, 73, heads=6, kv_heads=2, sizes=sizes), alpha]
    compare(lambda q, k, v, a: entmax_attention(q, k, v, a, enable_gqa=True, is_causal=True), inputs, monkeypatch)
    compare(lambda q, k, v, a: entmax_attention(q, k, v, a, enable_gqa=True, scale=0.3), inputs, monkeypatch)


NEEDS_PAIRS = pytest.mark.skipif("avx512_bf16" not in rows.variants(), reason="no AVX512-BF16")

PLACEMENTS = {  # in memory; only the first is read in place
    "whole": lambda *shape: torch.empty(*shape, 64, dtype=torch.bfloat16),
    "odd size": lambda *shape: torch.empty(*shape, 61, dtype=torch.bfloat16),
    "odd start": lambda *shape: torch.empty(*shape, 128, dtype=torch.bfloat16)[..., 1:65],
    "odd rows": lambda *shape: torch.empty(*shape, 65, dtype=torch.bfloat16)[..., :64],
    "every second": lambda *shape: torch.empty(*shape, 128, dtype=torch.bfloat16)[..., ::2],
}


@NEEDS_PAIRS
@pytest.mark.parametrize(("queries", "keys"), [(1, 37), (4, 300), (61, 67), (53, 401)])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_pairs_of_bfloat16_equal_widening_to_float32(placement, queries, keys, monkeypatch):
    inputs = [PLACEMENTS[placement](2, 3, n).normal_().requires_grad_() for n in (queries, keys, keys)]
    results = []
    for variant in ("avx512", "avx512_bf16"):
        with monkeypatch.context() as patch:
            force(variant, patch)
            results.append(run(lambda *qkv: entmax_attention(*qkv, is_causal=True, scale=0.3), inputs))
    for widened, paired in zip(*results, strict=True):
        # Sums in another order may differ in the last digit of bfloat16.
        torch.testing.assert_close(paired, widened, rtol=2**-7, atol=1e-3)
        assert (paired == widened).float().mean() > 0.97


@NEEDS_PAIRS
@pytest.mark.parametrize("keys", [37, 401])
@pytest.mark.parametrize("place", ["query", "key", "both"])
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e-39])
def test_pairs_of_bfloat16_with_special_numbers(number, place, keys, monkeypatch):
    inputs = [x.bfloat16() for x in tensors(torch.float32, 31, keys, sizes=(64, 8))]
    if place in ("query", "both"):
        inputs[0][0, 1, 5, 7] = inputs[0][1, 0, 3, 8] = number
    if place in ("key", "both"):
        inputs[1][0, 0, 11, 7] = inputs[1][1, 2, 3, 8] = number
    outputs = []
    for variant in ("avx512", "avx512_bf16"):
        with monkeypatch.context() as patch:
            force(variant, patch)
            outputs.append(entmax_attention(*inputs))
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.6, 1 + 1e-9, 1.001, 1.95, 3.0])
def test_every_kind_of_alpha(alpha, monkeypatch):
    inputs = [*tensors(torch.float32), torch.tensor(alpha, dtype=torch.float64)]
    with monkeypatch.context() as patch:
        patch.setitem(BOUNDS, torch.float32, 3e-4 if alpha > 2 else 1e-4)
        compare(lambda q, k, v, a: entmax_attention(q, k, v, a), inputs, monkeypatch)


def test_weights_beyond_the_kept_memory_are_recomputed(monkeypatch):
    inputs = [x / 10 for x in tensors(torch.float32, 53, 401)]  # flat rows: all keys have weight
    for attend in (entmax_attention, lambda *qkv: entmax_attention(*qkv, 2.0, is_causal=True)):
        compare(attend, inputs, monkeypatch)


@pytest.mark.parametrize("left", [None, 0, 11])
@pytest.mark.parametrize("offset", [None, -7, 0, 5, 100])
@pytest.mark.parametrize("keys", [37, 301])
def test_causal_offset_and_window_equal_masks(keys, offset, left, monkeypatch):
    query, key, value = (x.requires_grad_() for x in tensors(torch.float64, 61, keys))
    i, j = torch.arange(61)[:, None], torch.arange(keys)
    seen = torch.ones(61, keys, dtype=torch.bool)
    seen &= j <= i + (1000 if offset is None else offset)
    seen &= j >= i - (1000 if left is None else left)
    setting = Setting(0.5, 0.4, 0.0, offset, None, left)
    inputs = (query, key, value)
    bounded = run(lambda *qkv: native.native_attention(*qkv, None, None, setting), inputs)
    masked = run(
        lambda *qkv: native.native_attention(*qkv, None, seen[None, None], Setting(0.5, 0.4, 0.0, None)), inputs
    )
    plain = run(lambda *qkv: plain_attention(*qkv, setting=setting), inputs)
    for x, y, z in zip(bounded, masked, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(x, z, atol=1e-10, rtol=1e-10)


def test_strides_batches_and_heads_that_broadcast(monkeypatch):
    query, key, value = tensors(torch.float32, 41, 43)
    sequence_first = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (query, key, value)]
    got = compare(entmax_attention, sequence_first, monkeypatch)
    assert all(x.stride() == y.stride() for x, y in zip(got[1:], sequence_first, strict=True))
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    compare(entmax_attention, transposed, monkeypatch)
    compare(entmax_attention, [query, key[:1], value[:1]], monkeypatch)
    compare(entmax_attention, [query, key[:, :1], value[:, :1]], monkeypatch)
    compare(entmax_attention, [query[0, 0], key[0, 0], value[0, 0]], monkeypatch)
    compare(entmax_attention, [x[None] for x in (query, key, value)], monkeypatch)
    compare(lambda *qkv: entmax_attention(*qkv, attn_mask=causal_lower_right(41, 43)), [query, key, value], monkeypatch)
    every_second, mask = [x[..., ::2, :] for x in (query, key, value)], (torch.rand(21, 44) > 0.3)[:, ::2]
    compare(lambda *qkv: entmax_attention(*qkv, attn_mask=mask), every_second, monkeypatch)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.2, "top-k"])
@pytest.mark.parametrize(("queries", "keys"), [(23, 29), (61, 307)])
def test_nan_in_padding_changes_nothing(queries, keys, alpha):
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = torch.arange(keys) < keys - 7
        if alpha == "top-k":
            return topk_attention(query, key, value, 5, attn_mask=seen)
        return entmax_attention(query, key, value, alpha, attn_mask=seen)

    inputs = [x.requires_grad_() for x in tensors(torch.float32, queries, keys)]
    clean = run(attend, inputs)
    spoilt = [x.detach().clone() for x in inputs]
    spoilt[1][..., -7:, :], spoilt[2][..., -7:, :] = math.nan, math.inf
    for got, wanted in zip(run(attend, [x.requires_grad_() for x in spoilt]), clean, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("keys", [29, 307])
def test_a_query_without_visible_keys_gets_zeros_and_a_nan_query_gets_nan(keys):
    query, key, value = (x.requires_grad_() for x in tensors(torch.float32, 23, keys))
    for mask in (torch.zeros(23, keys, dtype=torch.bool), torch.full((keys,), torch.finfo(torch.float32).min)):
        for x in run(lambda *qkv, mask=mask: entmax_attention(*qkv, attn_mask=mask), [query, key, value]):
            assert (x == 0).all()
    spoilt = query.detach().clone()
    spoilt[0, 1, 5] = math.nan
    output = entmax_attention(spoilt, key, value)
    assert output[0, 1, 5].isnan().all()
    output[0, 1, 5] = 0
    assert not output.isnan().any()
    spoilt[0, 1, 5] = 1e30
    spoilt_key = key.detach().clone()
    spoilt_key[0, 1, 3] = 1e30
    assert entmax_attention(spoilt, spoilt_key, value)[0, 1, 5].isnan().all()  # a score of +inf


@pytest.mark.parametrize("keys", [29, 300])
def test_ties_go_to_the_first_keys(keys):
    query, key = torch.zeros(1, 1, 19, 5), torch.randn(1, 1, keys, 5)
    value = torch.eye(keys)[None, None]
    assert (topk_attention(query, key, value, 7)[..., :7] == 1 / 7).all()
    query = torch.randint(-1, 2, (1, 1, 19, 1)).float()  # ties in some rows, and at several places
    key = torch.randint(-9, 10, (1, 1, keys, 1)).float()
    with use_backend("torch"):
        wanted = topk_attention(query, key, value, 7)
    torch.testing.assert_close(topk_attention(query, key, value, 7), wanted)


def test_dropout_agrees_with_the_plain_path_and_the_backward():
    inputs = [x.requires_grad_() for x in tensors(torch.float64, 31, 300)]
    seed, setting = torch.tensor(12345), Setting(0.5, 0.3, 0.4, None)
    plain = run(lambda *qkv: plain_attention(*qkv, seed=seed, setting=setting), inputs)
    plan = attention.plan_of(native.Tensors(*inputs), setting)
    ours = run(lambda *qkv: native.planned_attention(*qkv, None, None, seed, None, None, plan), inputs)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
    query, key, _ = inputs
    ones = torch.ones(2, 3, 300, 1, dtype=torch.float64)
    output = entmax_attention(query, key, ones, 1.0, dropout_p=0.3)
    assert abs(output.mean().item() - 1) < 0.05 and output.std() > 0.01
    assert (entmax_attention(query, key, ones, 1.0, dropout_p=1.0) == 0).all()
    torch.manual_seed(3)
    first = entmax_attention(query, key, ones, dropout_p=0.3)
    assert not torch.equal(entmax_attention(query, key, ones, dropout_p=0.3), first)
    torch.manual_seed(3)
    assert torch.equal(entmax_attention(query, key, ones, dropout_p=0.3), first)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = [x.requires_grad_() for x in tensors(torch.float32, 301, 307, heads=2, kv_heads=1)]
    bias = torch.randn(307, requires_grad=True)
    alpha = torch.tensor([1.5, 1.2], requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for mask in (None, bias):
            attend = lambda q, k, v, a, *m: entmax_attention(q, k, v, a, *m, enable_gqa=True)  # noqa: E731
            results.append(run(attend, [*inputs, alpha, *([] if mask is None else [mask])]))
    torch.set_num_threads(before)
    for one, three in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


def test_derivatives_of_first_and_second_order():
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, 2, 7, 3, dtype=torch.float64)]
    alpha = torch.tensor([1.2, 1.6], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    for dropout_p in (0.0, 0.4):

        def attend(*inputs: Tensor, dropout_p: float = dropout_p) -> Tensor:
            torch.manual_seed(1)
            return entmax_attention(*inputs, dropout_p=dropout_p)

        assert torch.autograd.gradcheck(attend, (*qkv, alpha, bias))
        assert torch.autograd.gradgradcheck(attend, (*qkv, alpha, bias))


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


@since_torch(2, 8, "the smaller of two symbolic lengths limits a graph")
def test_one_graph_trains_with_every_length():
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entmax_attention, fullgraph=True, backend=graphs, dynamic=True)
    first = None
    # The numbers of keys limit a tile to 48, 36 or 12 queries.
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


def test_autocast_gives_an_output_in_its_dtype():
    query, key, value = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entmax_attention(query, key, value).dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_attention_works_after_a_fork():
    inputs = tensors(torch.float32)
    expected = entmax_attention(*inputs)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(entmax_attention(*inputs), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_from_several_threads():
    inputs = tensors(torch.float32, 129, 131)
    expected = entmax_attention(*inputs)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(entmax_attention(*inputs))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(x, expected) for x in results)


def test_invalid_input_raises_an_error():
    query, key, value = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got -1"):
        entmax_attention(query, key, value, alpha=torch.tensor([1.5, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got 0"):
        entmax_attention(query, key, value, alpha=0)
    with pytest.raises(ValueError, match="attn_mask must broadcast to the scores"):
        entmax_attention(query, key, value, attn_mask=torch.ones(13, 16, dtype=torch.bool))
