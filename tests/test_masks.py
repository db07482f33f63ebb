"""Both mask conventions, merged into one internal form and applied to scores."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from sparse_attn.masks import (
    ScoreShape,
    apply_mask,
    causal_mask,
    check_mask_dtype,
    check_window,
    combine_masks,
    merge_multihead_masks,
    visible_keys,
    window_mask,
)

N, H, L, S = 2, 3, 5, 7
INF = math.inf


@pytest.mark.parametrize("offset", [-2, 0, 2, S - L])
def test_a_query_sees_the_keys_up_to_its_own_position(offset: int) -> None:
    mask = causal_mask(L, S, offset=offset)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[j <= i + offset for j in range(S)] for i in range(L)]


@pytest.mark.parametrize("offset", [-2, 0, 2, S - L])
@pytest.mark.parametrize("window", [1, 3, (2, 0), (0, 0), (0, 3), (None, 1), (2, None), (None, None), (100, 100)])
def test_a_query_sees_the_keys_in_its_window(window: Any, offset: int) -> None:
    left, right = check_window(window)
    assert (left, right) == (window if isinstance(window, tuple) else (window, window))
    mask = window_mask(L, S, window, offset=offset)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [
        [(left is None or j >= i + offset - left) and (right is None or j <= i + offset + right) for j in range(S)]
        for i in range(L)
    ]


def test_a_window_that_ends_at_the_query_is_causal() -> None:
    assert torch.equal(window_mask(L, S, (None, 0), offset=2), causal_mask(L, S, offset=2))


SHAPES = [(N, H, L, S), (N, 1, 1, S), (H, 1, S), (L, S), (1, S)]


@pytest.mark.parametrize(("first", "second"), list(product(SHAPES, SHAPES)), ids=str)
@pytest.mark.parametrize(("first_float", "second_float"), list(product([False, True], repeat=2)))
def test_combined_masks_equal_masks_applied_one_after_another(
    first: tuple[int, ...], second: tuple[int, ...], first_float: bool, second_float: bool
) -> None:
    masks = [
        torch.randn(shape) if floating else torch.rand(shape) < 0.6
        for shape, floating in ((first, first_float), (second, second_float))
    ]
    scores = torch.randn(N, H, L, S)
    expected = apply_mask(apply_mask(scores, masks[0]), masks[1])
    combined = combine_masks(*masks)
    assert combined.dtype == (torch.float32 if first_float or second_float else torch.bool)
    torch.testing.assert_close(apply_mask(scores, combined), expected, rtol=1e-6, atol=1e-6)
    visible = visible_keys(combined, S, scores.device)
    assert torch.equal(visible.expand(N, H, L), (expected > -INF).sum(-1))


def test_without_masks_everything_is_visible() -> None:
    mask = torch.rand(L, S) < 0.5
    assert combine_masks(None, None) is None
    assert combine_masks(mask, None) is mask and combine_masks(None, mask) is mask
    assert visible_keys(None, S, mask.device).tolist() == [S]


def test_scores_without_a_mask_are_returned_unchanged() -> None:
    scores = torch.randn(N, H, L, S)
    assert apply_mask(scores, None) is scores


@pytest.mark.parametrize("shape", [(N, H, L, S), (N, 1, 1, S), (H, 1, S), (L, S), (L, 1), (S,), (1, 1, 1, 1), ()])
def test_boolean_masks_hide_and_float_masks_are_added(shape: tuple[int, ...]) -> None:
    scores, visible = torch.randn(N, H, L, S), torch.rand(shape) < 0.5
    full = visible.expand(N, H, L, S)
    masked = apply_mask(scores, visible)
    assert bool((masked[full] == scores[full]).all()) and bool((masked[~full] == -INF).all())
    added = torch.randn(shape)
    torch.testing.assert_close(apply_mask(scores, added), scores + added, rtol=0, atol=0)


def test_scores_keep_their_dtype_and_are_not_changed_in_place() -> None:
    scores = torch.randn(L, S, dtype=torch.bfloat16)
    before = scores.clone()
    for mask in (torch.rand(L, S) < 0.5, torch.randn(L, S), torch.randn(L, S, dtype=torch.float64)):
        assert apply_mask(scores, mask).dtype == torch.bfloat16
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("bias", "offset"), [(causal_upper_left, 0), (causal_lower_right, S - L)])
def test_a_causal_bias_equals_its_mask(bias: Any, offset: int) -> None:
    scores = torch.randn(N, H, L, S)
    expected = apply_mask(scores, causal_mask(L, S, offset=offset))
    torch.testing.assert_close(apply_mask(scores, bias(L, S)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(S, L), (2, S), (L, 2), (2, H, L, S - 1), (1, N, H, L, S), (N * H, L, S)])
def test_a_mask_that_does_not_broadcast_raises_an_error(shape: tuple[int, ...]) -> None:
    message = rf"^attn_mask must broadcast to the scores \(2, 3, 5, 7\), got shape \({', '.join(map(str, shape))}\)$"
    for mask in (torch.ones(shape).bool(), torch.ones(shape)):
        with pytest.raises(ValueError, match=message):
            apply_mask(torch.randn(N, H, L, S), mask)


def merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    return merge_multihead_masks(attn_mask, key_padding_mask, ScoreShape(N, H, L, S))


def added(mask: Tensor | None) -> Tensor:
    """The numbers that a mask of `nn.MultiheadAttention` adds to the scores."""
    if mask is None:
        return torch.zeros(())
    return torch.zeros(mask.shape).masked_fill(mask, -INF) if mask.dtype == torch.bool else mask


@pytest.mark.parametrize(
    ("attn", "padding"),
    list(product(["none", "bool 2-D", "float 2-D", "bool 3-D", "float 3-D"], ["none", "bool", "float"])),
)
def test_two_masks_are_merged_into_one(attn: str, padding: str) -> None:
    shape = (L, S) if attn.endswith("2-D") else (N * H, L, S)
    attn_mask = None if attn == "none" else torch.randn(shape)
    key_padding_mask = None if padding == "none" else torch.randn(N, S)
    if attn_mask is not None and attn.startswith("bool"):
        attn_mask = attn_mask < 0
    if key_padding_mask is not None and padding == "bool":
        key_padding_mask = key_padding_mask < 0
    merged = merge(attn_mask, key_padding_mask)
    if attn == padding == "none":
        assert merged is None
        return
    assert merged is not None
    assert (merged.dtype == torch.bool) == ("float" not in attn + padding)
    expected = added(attn_mask)
    if attn.endswith("3-D"):
        expected = expected.view(N, H, L, S)
    expected = expected + added(key_padding_mask).reshape((N, 1, 1, S) if padding != "none" else ())
    scores = torch.randn(N, H, L, S)
    torch.testing.assert_close(apply_mask(scores, merged), scores + expected, rtol=0, atol=1e-6)


def test_masks_of_two_float_dtypes_are_merged_in_the_wider_dtype() -> None:
    merged = merge(torch.zeros(L, S, dtype=torch.float64), torch.zeros(N, S))
    assert merged is not None and merged.dtype == torch.float64


def test_masks_need_not_be_contiguous() -> None:
    attn_mask, padding = torch.rand(S, L) < 0.5, torch.rand(S, N) < 0.5
    found = merge(attn_mask.T.expand(N * H, L, S), padding.T)
    expected = merge(attn_mask.T.contiguous(), padding.T.contiguous())
    assert found is not None and expected is not None
    assert torch.equal(found, expected.expand(N, H, L, S))


@pytest.mark.parametrize("shape", [(S, L), (N, L, S), (H, L, S), (1, L, S), (N, H, L, S), (S,)])
def test_an_attn_mask_of_a_wrong_shape_raises_an_error(shape: tuple[int, ...]) -> None:
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    message = rf"^attn_mask must have shape \(L, S\) = \(5, 7\) or \(N \* num_heads, L, S\) = \(6, 5, 7\), got {given}$"
    with pytest.raises(ValueError, match=message):
        merge(torch.zeros(shape), None)


@pytest.mark.parametrize("shape", [(S, N), (N, L), (S,), (1, S), (N, 1, S)])
def test_a_padding_mask_of_a_wrong_shape_raises_an_error(shape: tuple[int, ...]) -> None:
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^key_padding_mask must have shape \(N, S\) = \(2, 7\), got {given}$"):
        merge(None, torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"^some_mask must be boolean or floating, got torch.int64$"),
        (torch.zeros(2, dtype=torch.uint8), r"^some_mask must be boolean or floating, got torch.uint8$"),
        (torch.zeros(2, dtype=torch.complex64), r"^some_mask must be boolean or floating, got torch.complex64$"),
        ([True], r"^some_mask must be a torch.Tensor, got list$"),
    ],
)
def test_a_mask_of_a_wrong_type_raises_an_error(mask: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_mask_dtype(mask, "some_mask")


@pytest.mark.parametrize(
    ("attn_mask", "key_padding_mask", "name"),
    [(torch.zeros(L, S).int(), None, "attn_mask"), (None, torch.zeros(N, S).int(), "key_padding_mask")],
)
def test_the_error_names_the_mask_with_the_wrong_dtype(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, name: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be boolean or floating, got torch.int32$"):
        merge(attn_mask, key_padding_mask)
    if attn_mask is not None:
        with pytest.raises(TypeError, match=r"^attn_mask must be boolean or floating, got torch.int32$"):
            apply_mask(torch.zeros(N, H, L, S), attn_mask)
