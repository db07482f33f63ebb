"""Arguments of the attention functions: error messages, and numbers and flags of numpy, which are accepted."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparse_attn import AdaptiveSparseMultiheadAttention, SparseAttention, entmax_attention, sparsemax, topk_attention

N, H, L, S, D, DV = 2, 3, 5, 7, 11, 13
FITTING = ((N, H, L, D), (N, H, S, D), (N, H, S, DV))
Q = torch.randn(2, 3, 5, 8)


def inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in FITTING)


WRONG_ARGUMENTS = [
    (((D,), (D,), (DV,)), {}, r"at least 2 dimensions; got query \(11,\)"),
    (((N, H, L, D), (N, H, S, DV), (N, H, S, DV)), {}, r"same last size D; .* \(2, 3, 5, 11\), key \(2, 3, 7, 13\)"),
    (((N, H, L, D), (N, H, S, D), (N, H, L, DV)), {}, r"same length S; .* key \(2, 3, 7, 11\), value \(2, 3, 5, 13\)"),
    (
        ((N, H, L, D), (5, H, S, D), (5, H, S, DV)),
        {},
        r"batch and head sizes must broadcast; got query \(2, 3, 5, 11\)",
    ),
    (
        ((N, 3, L, D), (N, 2, S, D), (N, 2, S, DV)),
        {"enable_gqa": True},
        r"a divisor of the query's; got .* \(2, 2, 7, 11\)",
    ),
    (FITTING, {"attn_mask": torch.ones(S, L).bool()}, r"broadcast to the scores \(2, 3, 5, 7\), got shape \(7, 5\)"),
    (FITTING, {"attn_mask": torch.ones(1, N, H, L, S).bool()}, r"broadcast .* got shape \(1, 2, 3, 5, 7\)"),
    (FITTING, {"attn_mask": causal_lower_right(3, S)}, r"scores \(2, 3, 5, 7\), got shape \(3, 7\)"),
    (FITTING, {"attn_mask": torch.ones(L, S).bool(), "is_causal": True}, "None when is_causal=True, got both"),
    (FITTING, {"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
]


@pytest.mark.parametrize(("shapes", "kwargs", "message"), WRONG_ARGUMENTS)
def test_wrong_shapes_and_options_raise_an_error(shapes: Any, kwargs: dict[str, Any], message: str) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        entmax_attention(*tensors, **kwargs)
    with pytest.raises(ValueError, match=message):
        topk_attention(*tensors, 2, **kwargs)


def test_a_wrong_mask_dtype_raises_an_error() -> None:
    with pytest.raises(TypeError, match=r"attn_mask must be boolean or floating, got torch.int64"):
        entmax_attention(*inputs(), attn_mask=torch.ones(L, S).long())


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (0.0, ValueError, r"alpha must be in \(0, inf\), got 0.0"),
        (math.inf, ValueError, r"alpha must be in \(0, inf\), got inf"),
        (torch.tensor([1.5, -2.0, 1.0]), ValueError, r"alpha must be in \(0, inf\), got -2"),
        (torch.tensor([1.5, 2.0]), ValueError, r"alpha must be a number or have shape \(H,\) = \(3,\), got \(2,\)"),
        (torch.ones(H, 1, 1), ValueError, r"have shape \(H,\) = \(3,\), got \(3, 1, 1\)"),
        (
            torch.tensor([1, 2, 1]),
            TypeError,
            "alpha must be a number or a floating tensor, got a tensor of torch.int64",
        ),
        ("1.5", TypeError, "alpha must be a number or a floating tensor, got str"),
    ],
)
def test_a_wrong_alpha_raises_an_error(alpha: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        entmax_attention(*inputs(), alpha)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"k": 2, "normalizer": "entmax"}, ValueError, "normalizer must be one of softmax, sparsemax, got 'entmax'"),
    ],
)
def test_a_wrong_k_or_normalizer_raises_an_error(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk_attention(*inputs(), **kwargs)


def test_inputs_of_wrong_dtypes_or_with_wrong_numbers_of_heads_or_batches_are_refused() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(TypeError, match=r"key must have a floating dtype .*, got torch\.int64"):
        entmax_attention(x, x.long(), x)
    with pytest.raises(TypeError, match=r"must have one dtype, got torch\.float32, torch\.float64, torch\.float32"):
        entmax_attention(x, x.double(), x)
    with pytest.raises(ValueError, match="a divisor of the query's"):
        entmax_attention(x, x[:, :0], x[:, :0], enable_gqa=True)
    with pytest.raises(ValueError, match="must broadcast"):
        entmax_attention(x.expand(3, -1, -1, -1), x.expand(2, -1, -1, -1), x.expand(2, -1, -1, -1), enable_gqa=True)


@pytest.mark.parametrize("attention", [partial(entmax_attention, alpha=1.5), partial(topk_attention, k=2)])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"query": [1]}, TypeError, r"query must be a torch\.Tensor, got list"),
        ({"key": Q.numpy()}, TypeError, r"key must be a torch\.Tensor, got ndarray"),
        ({"is_causal": "no"}, TypeError, "is_causal must be True or False, got 'no'"),
        ({"enable_gqa": "no"}, TypeError, "enable_gqa must be True or False, got 'no'"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
        ({"scale": True}, TypeError, "scale must be a number, got True"),
        ({"scale": "x"}, TypeError, "scale must be a number, got 'x'"),
        ({"scale": torch.tensor(0.25, requires_grad=True)}, TypeError, "scale must be a number, got tensor"),
    ],
)
def test_an_invalid_argument_is_named_in_the_error(
    attention: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention(**{"query": Q, "key": Q, "value": Q, **kwargs})


def test_an_invalid_k_normalizer_or_scale_is_named_in_the_error() -> None:
    with pytest.raises(TypeError, match="k must be an int, got Tensor"):
        topk_attention(Q, Q, Q, torch.tensor([2, 3]))
    with pytest.raises(ValueError, match=r"normalizer must be one of softmax, sparsemax, got \['softmax'\]"):
        topk_attention(Q, Q, Q, 2, normalizer=["softmax"])
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        SparseAttention(k=2, scale=math.nan)


def test_numbers_and_flags_of_numpy_are_accepted() -> None:
    options = {"is_causal": numpy.bool_(True), "scale": numpy.float32(0.5)}
    torch.testing.assert_close(
        topk_attention(Q, Q, Q, numpy.int64(2), **options), topk_attention(Q, Q, Q, 2, is_causal=True, scale=0.5)
    )
    assert torch.equal(sparsemax(Q, dim=numpy.int64(1)), sparsemax(Q, dim=1))
    with pytest.raises(TypeError, match="dim must be an int, got bool"):
        sparsemax(Q, dim=True)
    layer = AdaptiveSparseMultiheadAttention(numpy.int64(16), numpy.int32(2))
    assert type(layer.embed_dim) is int and type(layer.num_heads) is int
