"""Records of modules that report their own attention weights: `SparseAttention` and a user's modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import SparseAttention
from sparse_attn.analysis import record_attention
from sparse_attn.observe import register_reporter, report_weights, weights_are_observed

N, L, S, E, H = 2, 5, 7, 12, 4


@pytest.mark.parametrize("masks", ["none", "bool", "causal"])
@pytest.mark.parametrize("heads", [None, H])
def test_sparse_attention_reports_its_weights(heads: int | None, masks: str) -> None:
    model = nn.Sequential(SparseAttention(alpha=1.0), SparseAttention(k=2))
    shape = (N, L, E) if heads is None else (N, heads, L, 3)
    query, key, value = (torch.randn(shape) for _ in range(3))
    mask = torch.rand(N, 1, L, L) < 0.5 if heads else torch.rand(N, L, L) < 0.5
    mask[..., 0] = True
    arguments = {"none": {}, "bool": {"attn_mask": mask}, "causal": {"is_causal": True}}[masks]
    expected = [layer(query, key, value, **arguments) for layer in model]
    with record_attention(model) as record:
        for layer, output in zip(model, expected, strict=True):
            torch.testing.assert_close(layer(query, key, value, **arguments), output)
    assert list(record) == ["0", "1"] and not weights_are_observed()
    dense, top = record["0"], record["1"]
    assert dense.density.tolist() == [1.0] * (heads or 1)
    assert dense.alpha is not None and dense.alpha.tolist() == [1.0] * (heads or 1)
    assert top.rows.tolist() == [N * L] * (heads or 1)
    assert bool((top.support_size <= 2.0).all())
    if masks == "none":
        assert top.support_size.tolist() == [2.0] * (heads or 1)
        torch.testing.assert_close(top.density, top.support_size / L)


class OwnBlock(nn.Module):
    """A module of a user that reports its weights."""

    alpha = 2.0

    def forward(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1).round(decimals=1)
        weights[0, :, 1] = 0.0  # a query without visible keys
        if weights_are_observed():
            report_weights(self, weights)
        return weights


class OtherBlock(OwnBlock):
    """A module that no registered function recognises."""


def is_own_block(module: nn.Module) -> bool:
    return type(module) is OwnBlock


def test_a_registered_module_reports_its_weights(assert_statistics: Callable[..., None]) -> None:
    model, other = nn.Sequential(nn.Identity(), OwnBlock()), OwnBlock()
    scores = torch.randn(N, H, L, S)
    handle = [register_reporter(is_own_block) for _ in range(2)][-1]  # the second call replaces the first
    with record_attention(model) as record:
        weights = model(scores)
        other(scores)  # not in the recorded model
    assert list(record) == ["1"] and not weights_are_observed()
    assert_statistics(record["1"], [(weights, torch.tensor(True))])
    assert record["1"].alpha is not None and record["1"].alpha.tolist() == [2.0] * H
    with pytest.raises(ValueError, match="of this library, such as 'entmax'; got OtherBlock, which"):
        record_attention(OtherBlock())
    handle.remove()
    with pytest.raises(ValueError, match="got OwnBlock, which has no such layer"):
        record_attention(OwnBlock())


def test_a_reporter_that_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="reports must be a function of a module, got 'OwnBlock'"):
        register_reporter("OwnBlock")


def test_calls_with_another_number_of_heads_have_a_separate_entry() -> None:
    model = nn.Sequential(SparseAttention(k=2))
    with record_attention(model) as record:
        for heads in (2, 3, 2):
            model[0](*torch.randn(3, N, heads, L, E))
        model[0](*torch.randn(3, N, S, E))
    assert {name: heads.rows.tolist() for name, heads in record.items()} == {
        "0": [2 * N * L] * 2,
        "0 (3 heads)": [N * L] * 3,
        "0 (1 head)": [N * S],
    }
