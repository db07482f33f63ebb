"""α in a checkpoint: values that fit the module are loaded, others are refused; half precision becomes float32."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, Entmax, SparseAttention
from sparse_attn.optim import set_alpha

H, E = 3, 33


def layer_of(**kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(E, H, batch_first=True, **kwargs)


def test_a_checkpoint_with_another_number_of_heads_is_refused() -> None:
    other = AdaptiveSparseMultiheadAttention(E, 11)
    with pytest.raises(RuntimeError, match="size mismatch for raw_alpha"):
        layer_of(alpha_init=1.0, learn_alpha=False).load_state_dict(other.state_dict())


def saved_and_loaded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(alpha: float, **kwargs: Any) -> dict[str, Tensor]:
    """A saved and loaded state whose parameter has the given value. As after a training, it can be past a bound."""
    model = nn.Sequential(layer_of(**kwargs))
    with torch.no_grad():
        model[0].raw_alpha.fill_(alpha)
    return saved_and_loaded(model.state_dict())


WIDE = {"alpha_range": (1.0, 3.0)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            state_of(2.8, **WIDE),
            r"0.raw_alpha must be in the layer's alpha_range \[1, 2\], got 2.8, learnt in \[1, 3\]",
        ),
        (state_of(2.05, **WIDE), r"got 2.05, learnt in \[1, 3\]"),
        (dict(state_of(2.8, **WIDE)), r"0.raw_alpha must be in the layer's alpha_range \[1, 2\], got 2.8$"),
        (dict(state_of(0.25)), r"got 0.25$"),
        (state_of(math.nan), r"got nan, learnt in \[1, 2\]"),
        (state_of(math.inf), "got inf"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_wrong_alpha_is_refused_and_the_old_one_kept(state: Any, message: str, assign: bool) -> None:
    model = nn.Sequential(layer_of(alpha_init=[1.25, 1.5, 1.75]))
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert model[0].alpha.tolist() == [1.25, 1.5, 1.75]


@pytest.mark.parametrize("wrong", [0.0, -1.5, math.nan])
def test_an_invalid_fixed_alpha_is_refused(wrong: float) -> None:
    module = Entmax(torch.tensor([1.5, 1.25]))
    with pytest.raises(RuntimeError, match=r"raw_alpha must be in \(0, inf\), got"):
        module.load_state_dict({"raw_alpha": torch.tensor([1.5, wrong])})
    assert module.alpha.tolist() == [1.5, 1.25]


@pytest.mark.parametrize(
    ("state", "alpha"),
    [
        (state_of(1.8, **WIDE), 1.8),
        (state_of(2.01, **WIDE), 2.01),
        (state_of(2.3), 2.3),  # momentum can move the parameter past the bound 2: a resumed training continues from 2.3
        (state_of(-0.25), -0.25),
        (dict(state_of(0.7)), 0.7),  # `dict` drops the range in which α was learnt
        (nn.Sequential(nn.MultiheadAttention(E, H)).state_dict(), 1.5),
    ],
)
def test_states_that_fit_the_layer_are_loaded(state: Any, alpha: float) -> None:
    model = nn.Sequential(layer_of())
    model.load_state_dict(state)
    torch.testing.assert_close(model[0].raw_alpha.detach(), torch.full((H,), alpha))


@pytest.mark.parametrize(
    "optimize",
    [
        lambda alphas: torch.optim.SGD(alphas, lr=0.2, momentum=0.9),
        lambda alphas: torch.optim.AdamW(alphas, lr=0.1, weight_decay=1.0),
    ],
)
def test_alpha_that_momentum_or_weight_decay_moved_past_a_bound_is_loaded(
    optimize: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    layer, again = layer_of(alpha_init=1.0), layer_of()
    optimizer = optimize([layer.raw_alpha])
    for _ in range(20):
        optimizer.zero_grad()
        layer.alpha.sum().backward()
        optimizer.step()
    assert bool((layer.raw_alpha < 0.5).all())
    again.load_state_dict(saved_and_loaded(layer.state_dict()))
    torch.testing.assert_close(again.raw_alpha, layer.raw_alpha)
    assert again.alpha.tolist() == [1.0] * H


@pytest.mark.parametrize("make", [layer_of, lambda: Entmax(torch.full((H,), 1.5)), lambda: SparseAttention(alpha=1.25)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_in_half_precision_is_converted_to_float32(make: Any, assign: bool) -> None:
    module = make()
    alpha = torch.full_like(module.alpha_as_tensor(), 1.75, dtype=torch.bfloat16)
    module.load_state_dict({**module.state_dict(), "raw_alpha": alpha}, assign=assign)
    assert module.raw_alpha.dtype == torch.float32 and set(module.raw_alpha.flatten().tolist()) == {1.75}
    assert module.raw_alpha.requires_grad == isinstance(module, AdaptiveSparseMultiheadAttention)


@pytest.mark.parametrize(("raw", "alpha"), [(0.985, 1.0), (2.015, 2.0), (-3.0, 1.0)])
@pytest.mark.parametrize("kwargs", [{"learn_alpha": False}, {"alpha_range": (0.98, 3.0)}])
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_with_fixed_alpha_or_another_range_gets_the_clamped_alpha(
    raw: float, alpha: float, kwargs: dict[str, Any], assign: bool
) -> None:
    state = state_of(raw)
    model = nn.Sequential(layer_of(**kwargs))
    model.load_state_dict(state, assign=assign)
    assert model[0].alpha.tolist() == [alpha] * H
    assert state["0.raw_alpha"].tolist() == [torch.tensor(raw).item()] * H


def test_a_fixed_alpha_outside_the_range_of_a_learnt_alpha_is_refused() -> None:
    fixed = Entmax(torch.tensor([1.5, 2.25]))
    learnt = Entmax(torch.tensor([1.25, 1.25]), learn_alpha=True)
    with pytest.raises(RuntimeError, match=r"alpha_range \[1, 2\], got 2.25$"):
        learnt.load_state_dict(saved_and_loaded(fixed.state_dict()))
    assert learnt.alpha.tolist() == [1.25, 1.25]


@pytest.mark.parametrize("make", [lambda: layer_of(learn_alpha=False), lambda: Entmax(1.5)])
@pytest.mark.parametrize("wrong", [torch.full((H,), -1.0), torch.ones(7, 1)])
def test_a_refused_load_adds_no_buffer(make: Any, wrong: Tensor) -> None:
    module = make()
    before = list(module.state_dict())
    with pytest.raises(RuntimeError, match="raw_alpha"):
        module.load_state_dict({**module.state_dict(), "raw_alpha": wrong})
    assert list(module.state_dict()) == before and module.raw_alpha is None
    assert set(torch.as_tensor(module.alpha).flatten().tolist()) == {1.5}
    set_alpha(module, 1.75)
    assert set(module.alpha.flatten().tolist()) == {1.75}
