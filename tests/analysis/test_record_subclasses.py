"""Recording of subclasses of `nn.MultiheadAttention`; some of them do not return weights as torch's layer does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from encoders import layer_of_four_heads
from torch import Tensor, nn

from sparse_attn import SparseAttention
from sparse_attn.analysis import record_attention

N, L, E, H = 2, 5, 12, 4


class Passing(nn.MultiheadAttention):
    """Passes all arguments on to torch's layer."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, **kwargs)


class Renaming(nn.MultiheadAttention):
    """Has other arguments, and returns weights as torch's layer does."""

    def forward(
        self, x: Tensor, average_attn_weights: bool = True, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(x, x, x, need_weights=need_weights, average_attn_weights=average_attn_weights)


class SelfAttention(nn.MultiheadAttention):
    """Has no argument for the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


class Unhelpful(nn.MultiheadAttention):
    """Has the argument for the weights but does not return them."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x, x, x, **kwargs)[0]


class Containing(nn.MultiheadAttention):
    """Attends with layers that are recorded themselves."""

    def __init__(self) -> None:
        super().__init__(E, H, batch_first=True)
        self.inner = nn.ModuleList([nn.MultiheadAttention(E, H, batch_first=True), layer_of_four_heads(E)])
        self.core = SparseAttention(k=2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        for layer in self.inner:
            value = layer(value, value, value)[0]
        return super().forward(query, key, self.core(value, value, value), **kwargs)


def test_subclasses_that_return_weights_are_recorded() -> None:
    model = nn.ModuleDict({"a": Passing(E, H, batch_first=True), "b": Renaming(E, H, batch_first=True)})
    x = torch.randn(N, L, E)
    padding = torch.arange(L).expand(N, L) >= torch.tensor([[3], [5]])
    with record_attention(model, weights=True) as record:
        model["a"](x, x, x, padding, False)
        for args in ((x,), (x, True), (x, True, False)):
            assert model["b"](*args)[1] is None
    assert record["a"].density.tolist() == [1.0] * H and record["a"].rows.tolist() == [N * L] * H
    assert record["a"].support_size.tolist() == [4.0] * H
    assert record["b"].rows.tolist() == [3 * N * L] * H
    assert record["b"].weights is not None and record["b"].weights.shape == (N, H, L, L)


def test_attention_nested_in_a_layer_counts_once() -> None:
    model, x = Containing(), torch.randn(N, L, E)
    with record_attention(model) as outer, record_attention(model) as inner:
        model(x, x, x)
    for record in (outer, inner):
        assert {name: heads.rows.tolist() for name, heads in record.items()} == {
            **dict.fromkeys(["inner.0", "inner.1", ""], [N * L] * H),
            "core": [N * L],
        }


def test_a_subclass_without_need_weights_is_not_recorded() -> None:
    layer, x = SelfAttention(E, H, batch_first=True), torch.randn(N, L, E)
    model = nn.Sequential(layer, layer_of_four_heads(E))
    with pytest.warns(UserWarning, match="'0' is not recorded: SelfAttention.forward does not take need_weights and"):
        context = record_attention(model)
    with context as record:
        assert torch.equal(layer(x), nn.MultiheadAttention.forward(layer, x, x, x)[0])
        model[1](x, x, x)
    assert list(record) == ["1"]
    with pytest.raises(ValueError, match="got SelfAttention, which has no such layer"):
        record_attention(layer)


def test_a_call_that_returns_no_weights_is_not_recorded_and_the_model_runs() -> None:
    layer, x = Unhelpful(E, H, batch_first=True), torch.randn(N, L, E)
    expected = layer(x)
    with record_attention(layer) as record:
        with pytest.warns(UserWarning, match="a call of '' is not recorded: TypeError: Unhelpful.forward gave no weig"):
            assert torch.equal(layer(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert layer.to("meta")(x.to("meta")).shape == x.shape
    assert not record
