"""Arguments of a wrong type or value raise an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_attn.analysis import (
    align,
    attention_rollout,
    density,
    entropy,
    head_diversity,
    head_worth,
    mean_per_head,
    merge_pieces,
    monotonicity,
    name_roles,
    offset_weight,
    own_word_weight,
    strongest_at_offset,
    word_groups,
)

W = torch.rand(2, 3, 5, 5).softmax(-1)


@pytest.mark.parametrize("function", [density, entropy, monotonicity, head_diversity, align])
@pytest.mark.parametrize("weights", ["x", None, W.numpy(), W.long()])
def test_weights_must_be_a_floating_tensor(function: Callable[[Any], Any], weights: Any) -> None:
    with pytest.raises(TypeError, match="weights must"):
        function(weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: offset_weight(W, 0.5), "offset must be an int, got 0.5"),
        (lambda: strongest_at_offset(W, True), "offset must be an int, got True"),
        (lambda: mean_per_head([0.5]), "values must be a torch.Tensor, got list"),
        (lambda: attention_rollout(None), "weights must be a list of one tensor per layer, got NoneType"),
        (lambda: attention_rollout([None]), "weights of a layer must be a torch.Tensor, got NoneType"),
        (lambda: attention_rollout([W.long()]), "weights of a layer must have a floating dtype"),
        (lambda: attention_rollout([W], "x"), "residual must be a number, got 'x'"),
        (lambda: merge_pieces(None, [0], [0]), "weights must be a torch.Tensor, got NoneType"),
        (lambda: merge_pieces(W, [None, 0, 0, 1, None], range(5)), "query_groups must be an int, got None"),
        (lambda: own_word_weight(W, [0, 0, 0.5, 1, 2]), "groups must be an int, got 0.5"),
        (lambda: word_groups("abc"), "tokens must be a list of strings, got 'abc'"),
        (lambda: word_groups(["a", 2]), "tokens must be a list of strings, got 2"),
        (lambda: name_roles({"next": [0.5]}), r"shares must be tensors \(H,\), got list for 'next'"),
        (lambda: head_worth(None, float), "model must be a torch.nn.Module, got NoneType"),
    ],
)
def test_an_argument_of_a_wrong_type_raises_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("groups", [[0, 0, 2, 2, 2], [1, 1, 2, 2, 3], [-1, 0, 0, 1, 1]])
def test_a_word_without_a_piece_raises_an_error(groups: list[int]) -> None:
    with pytest.raises(ValueError, match=r"query_groups must number the words from 0 without a gap, got \["):
        merge_pieces(W, groups, range(5))


def test_shares_of_different_shapes_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"shares must all have the same shape \(H,\), got \(2,\), \(3,\)"):
        name_roles({"next": torch.ones(2), "self": torch.ones(3)})


def test_groups_may_be_a_tensor() -> None:
    groups = [0, 0, 1, 2, 2]
    assert torch.equal(merge_pieces(W, torch.tensor(groups), groups), merge_pieces(W, groups, groups))
