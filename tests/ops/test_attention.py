"""The attention functions, compared with torch's function for softmax and with a float64 formula for all mappings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import each_backend
from entmax import entmax_bisect
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from sparse_attn import entmax_attention, topk_attention, use_backend

N, H, L, S, D, DV = 2, 3, 5, 7, 11, 13


def inputs(*, queries: int = L, keys: int = S) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((queries, D), (keys, D), (keys, DV))
    return tuple(torch.randn(N, H, *size, dtype=torch.float64, requires_grad=True) for size in sizes)


def formula(
    query: Tensor, key: Tensor, value: Tensor, alpha: float, *, visible: Tensor | None = None, k: int | None = None
) -> Tensor:
    """Attention, one query at a time, over the visible keys or the ``k`` visible keys with the largest scores."""
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    for n in range(N):
        for h in range(H):
            for i in range(query.shape[-2]):
                keys = range(key.shape[-2]) if visible is None else visible[n, h, i].nonzero()[:, 0].tolist()
                scores = {j: (query[n, h, i] @ key[n, h, j]).item() / math.sqrt(D) for j in keys}
                best = sorted(scores, key=lambda j: -scores[j])[:k]
                kept = torch.tensor([scores[j] for j in best], dtype=torch.float64)
                weights = kept.softmax(0) if alpha == 1 else entmax_bisect(kept, alpha, dim=0, n_iter=100)
                output[n, h, i] = weights @ value[n, h, best].detach()
    return output


def masks() -> dict[str, Tensor]:
    visible = torch.rand(N, H, L, S) < 0.6
    visible[..., 2] = True
    return {
        "bool": visible,
        "bool (L, S)": visible[0, 0],
        "bool (N, 1, 1, S)": visible[:, :1, :1],
        "bool (H, 1, S)": visible[0, :, :1],
        "float": torch.randn(N, H, L, S, dtype=torch.float64),
        "float (L, S)": torch.randn(L, S, dtype=torch.float64),
        "float (L, 1)": torch.randn(L, 1, dtype=torch.float64),
        "float (N, 1, L, S)": torch.randn(N, 1, L, S, dtype=torch.float64),
        "float with -inf": torch.zeros(L, S, dtype=torch.float64).masked_fill(~visible[0, 0], -math.inf),
    }


def assert_equals_torch(tensors: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Check that entmax attention at α = 1 and top-k attention with all keys have torch's output and gradients."""
    expected = F.scaled_dot_product_attention(*tensors, **kwargs)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, tensors, upstream)
    for actual in (
        entmax_attention(*tensors, 1.0, **kwargs),
        entmax_attention(*tensors, torch.ones(tensors[0].shape[-3]), **kwargs),
        topk_attention(*tensors, tensors[1].shape[-2], **kwargs),
        topk_attention(*tensors, 1000, **kwargs),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        grads = torch.autograd.grad(actual, tensors, upstream)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mask", masks())
def test_masks_work_as_in_torch(mask: str) -> None:
    assert_equals_torch(inputs(), attn_mask=masks()[mask])


@pytest.mark.parametrize(
    "kwargs", [{}, {"scale": 0.7}, {"is_causal": True}, {"is_causal": True, "scale": 2.0}], ids=str
)
@pytest.mark.parametrize(("queries", "keys"), [(L, S), (S, L), (1, S)])
def test_scale_and_is_causal_work_as_in_torch(kwargs: dict[str, Any], queries: int, keys: int) -> None:
    assert_equals_torch(inputs(queries=queries, keys=keys), **kwargs)


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize(("queries", "keys"), [(L, S), (1, S), (S, S)])
def test_causal_biases_work_as_in_torch(bias: Any, queries: int, keys: int) -> None:
    assert_equals_torch(inputs(queries=queries, keys=keys), attn_mask=bias(queries, keys))


def test_a_lower_right_bias_equals_the_end_of_the_full_pass() -> None:
    query, key, value = inputs(queries=S)
    for alpha in (1.0, 1.5, torch.tensor([1.0, 1.5, 2.0])):
        full = entmax_attention(query, key, value, alpha, is_causal=True)
        last = entmax_attention(query[..., -2:, :], key, value, alpha, causal_lower_right(2, S))
        torch.testing.assert_close(last, full[..., -2:, :], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"attn_mask": "bool"}], ids=str)
def test_grouped_queries_work_as_in_torch(kwargs: dict[str, Any]) -> None:
    query = torch.randn(N, 6, L, D, dtype=torch.float64, requires_grad=True)
    key = torch.randn(N, 3, S, D, dtype=torch.float64, requires_grad=True)
    value = torch.randn(N, 3, S, DV, dtype=torch.float64, requires_grad=True)
    if "attn_mask" in kwargs:
        kwargs = {"attn_mask": masks()["bool (L, S)"]}
    assert_equals_torch((query, key, value), enable_gqa=True, **kwargs)


SHAPES = [
    ((L, D), (S, D), (S, DV)),
    ((H, L, D), (H, S, D), (H, S, DV)),
    ((H, L, D), (N, H, S, D), (N, H, S, DV)),
    ((N, H, L, D), (S, D), (H, S, DV)),
    ((L, D), (N, 1, S, D), (H, S, DV)),
    ((H, L, 0), (H, S, 0), (H, S, DV)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_batch_dimensions_and_sizes_work_as_in_torch(shapes: tuple[tuple[int, ...], ...]) -> None:
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(entmax_attention(query, key, value, 1.0), expected)
    torch.testing.assert_close(topk_attention(query, key, value, S), expected)


@pytest.mark.parametrize(("queries", "keys"), [(0, S), (L, 0), (0, 0)])
def test_empty_queries_and_keys_work_as_in_torch(queries: int, keys: int) -> None:
    query, key, value = inputs(queries=queries, keys=keys)
    expected = F.scaled_dot_product_attention(query, key, value)
    for actual in (
        entmax_attention(query, key, value),
        topk_attention(query, key, value, 2),
        topk_attention(query, key, value, 2, normalizer="sparsemax"),
    ):
        torch.testing.assert_close(actual, expected)


def test_dropout_keeps_the_mean_and_is_always_applied() -> None:
    query, key, value = (x.detach() for x in inputs())
    ones = torch.ones_like(value)  # the output is then the sum of the weights
    for run in (
        lambda p: entmax_attention(query, key, ones, 1.0, None, p),
        lambda p: topk_attention(query, key, ones, 3, None, p),
    ):
        sums = torch.stack([run(0.5)[..., 0] for _ in range(200)])
        assert bool((sums.std(0) > 0.1).all())
        assert abs(sums.mean().item() - 1) < 0.05
        assert not run(1.0).any()
        torch.testing.assert_close(run(0.0), torch.ones(N, H, L, DV).double())


@pytest.mark.parametrize("masked", ["", "mask", "causal"])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_entmax_attention_equals_the_formula(alpha: float, masked: str) -> None:
    query, key, value = inputs()
    visible = masks()["bool"] if masked == "mask" else torch.ones(L, S, dtype=torch.bool).tril().expand(N, H, L, S)
    kwargs = {"": {}, "mask": {"attn_mask": visible}, "causal": {"is_causal": True}}[masked]
    output = entmax_attention(query, key, value, alpha, **kwargs)
    expected = formula(query, key, value, alpha, visible=visible if masked else None)
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-9)


def test_every_head_has_its_own_alpha_with_a_gradient() -> None:
    query, key, value = inputs()
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64, requires_grad=True)
    output = entmax_attention(query, key, value, alpha)
    for head in range(H):
        expected = formula(query, key, value, alpha[head].item())[:, head]
        torch.testing.assert_close(output[:, head], expected, rtol=1e-8, atol=1e-9)
    assert torch.autograd.gradcheck(entmax_attention, (query, key, value, alpha), fast_mode=True)


def test_a_single_alpha_tensor_is_used_for_all_heads() -> None:
    query, key, value = inputs()
    expected = entmax_attention(query, key, value, 1.3)
    alpha = torch.tensor(1.3, dtype=torch.float64)
    torch.testing.assert_close(entmax_attention(query, key, value, alpha), expected)


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@pytest.mark.parametrize("masked", ["", "mask", "causal"])
@pytest.mark.parametrize("k", [1, 3, S])
def test_topk_attention_equals_the_formula(k: int, masked: str, normalizer: Any) -> None:
    query, key, value = inputs()
    visible = masks()["bool"] if masked == "mask" else torch.ones(L, S, dtype=torch.bool).tril().expand(N, H, L, S)
    kwargs = {"": {}, "mask": {"attn_mask": visible}, "causal": {"is_causal": True}}[masked]
    output = topk_attention(query, key, value, k, normalizer=normalizer, **kwargs)
    alpha = {"softmax": 1.0, "sparsemax": 2.0}[normalizer]
    expected = formula(query, key, value, alpha, visible=visible if masked else None, k=k)
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-9)


def test_topk_attention_keeps_k_keys_or_all_that_are_visible() -> None:
    query, key = torch.randn(2, S, S, D)
    value = torch.eye(S).expand(S, S, S)  # the output is then the weights
    weights = topk_attention(query, key, value, 3, is_causal=True)
    assert (weights > 0).sum(-1).tolist() == [[min(i + 1, 3) for i in range(S)]] * S
    torch.testing.assert_close(weights.sum(-1), torch.ones(S, S))


@pytest.mark.parametrize("hidden", [False, -math.inf, torch.finfo(torch.float64).min])
def test_a_query_without_visible_keys_gets_zeros_and_no_gradient(hidden: bool | float) -> None:
    mask = torch.ones(L, S, dtype=torch.bool) if hidden is False else torch.zeros(L, S, dtype=torch.float64)
    mask[1] = hidden
    for run in (
        lambda q, k, v: entmax_attention(q, k, v, 1.0, mask),
        lambda q, k, v: entmax_attention(q, k, v, torch.tensor([1.0, 1.5, 2.0]), mask),
        lambda q, k, v: topk_attention(q, k, v, 2, mask),
    ):
        tensors = inputs()
        output = run(*tensors)
        assert not output[..., 1, :].any() and bool(output[..., [0, 2], :].all())
        output.square().sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in tensors)
        assert not tensors[0].grad[..., 1, :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    exact = inputs()
    tensors = tuple(x.detach().to(dtype).requires_grad_() for x in exact)
    alpha = torch.tensor([1.0, 1.5, 2.0], requires_grad=True)
    output = entmax_attention(*tensors, alpha)
    assert output.dtype == dtype
    expected = entmax_attention(*exact, alpha)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    assert [x.grad.dtype for x in (*tensors, alpha)] == [dtype] * 3 + [torch.float32]


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_the_smallest_number_of_the_dtype_of_a_mask_hides_keys(
    alpha: float, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    query, key, value = torch.full((1, 2, 3, 8), 10.0), torch.ones(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(3, 5, dtype=mask_dtype)
    mask[1] = torch.finfo(mask_dtype).min
    output = entmax_attention(query.to(dtype), key.to(dtype), value.to(dtype), alpha, mask)
    assert (output[:, :, 1] == 0).all() and (output[:, :, [0, 2]] != 0).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # a warning of Triton's interpreter about inf
@each_backend("torch", "compiled", "triton")
def test_long_keys_with_more_dimensions_than_the_query(backend: str) -> None:
    length = 521 if backend != "triton" else 23
    query, key, value = torch.randn(H, length, D), torch.randn(N, 1, length, D), torch.randn(N, 1, length, DV)
    alpha = torch.linspace(1, 2, H)
    with use_backend(backend):
        got = entmax_attention(query, key, value, alpha)
    wide = (x.double().expand(N, H, *x.shape[-2:]) for x in (query, key, value))
    torch.testing.assert_close(got, entmax_attention(*wide, alpha).float(), rtol=1e-4, atol=1e-5)


def test_one_query_head_against_many_key_heads() -> None:
    query, key, value = torch.randn(1, 1, 3, 8), torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0])
    together = entmax_attention(query, key, value, alpha)
    for head in range(4):
        alone = entmax_attention(query, key[:, [head]], value[:, [head]], alpha[head])
        torch.testing.assert_close(together[:, [head]], alone)


@each_backend("torch", "compiled")
def test_a_mask_that_is_no_tensor_raises_an_error(backend: str) -> None:
    x = torch.randn(1, 2, 3, 5)
    with use_backend(backend), pytest.raises(TypeError, match=r"attn_mask must be a torch\.Tensor, got list"):
        entmax_attention(x, x, x, 1.5, [[True]])
