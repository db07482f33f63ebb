"""α per head: the effect on the weights, training, checkpoints, dtypes, and errors for wrong values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import bisect_entmax
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, alpha_per_head

N, L, S, H, D = 2, 5, 7, 3, 11
E = H * D
ALPHAS = (1.0, 1.5, 2.0)


def layer_of(**kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(E, H, **{"batch_first": True, **kwargs})


def by_hand(
    layer: AdaptiveSparseMultiheadAttention, query: Tensor, memory: Tensor, alphas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Output (N, L, E) and weights (N, H, L, S), one batch row and one head at a time."""
    assert layer.in_proj_weight is not None
    weight, bias = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()
    q, k, v = (
        x @ weight[i * E : (i + 1) * E].T + bias[i * E : (i + 1) * E] for i, x in enumerate((query, memory, memory))
    )
    rows, maps = [], []
    for n in range(N):
        heads = []
        for h, alpha in enumerate(alphas):
            part = slice(h * D, (h + 1) * D)
            weights = bisect_entmax(q[n, :, part] @ k[n, :, part].T / math.sqrt(D), alpha)
            maps.append(weights)
            heads.append(weights @ v[n, :, part])
        rows.append(torch.cat(heads, -1))
    output = torch.stack(rows) @ layer.out_proj.weight.detach().T + layer.out_proj.bias.detach()
    return output, torch.stack(maps).view(N, H, L, S)


@pytest.mark.parametrize("learn_alpha", [True, False])
@pytest.mark.parametrize("alphas", [(1.5, 1.5, 1.5), ALPHAS, (1.1, 1.9, 1.3)])
def test_every_head_uses_its_own_alpha(alphas: tuple[float, ...], learn_alpha: bool) -> None:
    layer = layer_of(alpha_init=alphas, learn_alpha=learn_alpha, dtype=torch.float64)
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    query, memory = 3 * torch.randn(N, L, E, dtype=torch.float64), 3 * torch.randn(N, S, E, dtype=torch.float64)
    output, weights = layer(query, memory, memory, average_attn_weights=False)
    expected_output, expected_weights = by_hand(layer, query, memory, alphas)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output, expected_output, rtol=1e-9, atol=1e-9)
    for head, alpha in enumerate(alphas):
        if alpha == 1.0:
            assert bool((weights[:, head] > 0).all())
        if alpha >= 1.5:
            assert bool((weights[:, head] == 0).any())


@pytest.mark.parametrize("alphas", [(1.5, 1.5, 1.5), (1.2, 1.5, 1.9)])
def test_gradients_equal_finite_differences(alphas: tuple[float, ...]) -> None:
    layer = layer_of(alpha_init=alphas, dtype=torch.float64)
    query = torch.randn(N, L, E, dtype=torch.float64)
    memory = torch.randn(N, S, E, dtype=torch.float64)

    def run(query: Tensor, raw_alpha: Tensor, in_proj_weight: Tensor) -> Tensor:
        parameters = {"raw_alpha": raw_alpha, "in_proj_weight": in_proj_weight}
        output, _ = torch.func.functional_call(layer, parameters, (query, memory, memory))
        return output

    assert layer.raw_alpha is not None and layer.in_proj_weight is not None
    leaves = (query.requires_grad_(), layer.raw_alpha, layer.in_proj_weight)
    # `fast_mode` checks one random direction: the full Jacobian, for about 3600 numbers, would take a minute.
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("start", "target"), [(1.0, 1.6), (2.0, 1.3), (1.0, 2.0), (2.0, 1.0), (1.4, 1.0)])
def test_alpha_can_leave_and_reach_a_bound_but_not_cross_it(
    start: float, target: float, make_optimizer: type[torch.optim.Optimizer]
) -> None:
    layer = layer_of(alpha_init=start, dtype=torch.float64).requires_grad_(False)
    assert layer.raw_alpha is not None
    layer.raw_alpha.requires_grad_()
    teacher = copy.deepcopy(layer)
    nn.init.constant_(teacher.raw_alpha, target)
    x = 3 * torch.randn(N, S, E, dtype=torch.float64)
    with torch.no_grad():
        expected = teacher(x, x, x, average_attn_weights=False)[1]
    optimizer = make_optimizer([layer.raw_alpha], lr=0.3 if make_optimizer is torch.optim.SGD else 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        weights = layer(x, x, x, average_attn_weights=False)[1]
        (weights - expected).square().sum().backward()
        optimizer.step()
        assert bool(((layer.alpha >= 1.0) & (layer.alpha <= 2.0)).all())
    torch.testing.assert_close(layer.alpha.detach(), torch.full((H,), target).double(), rtol=0, atol=0.03)


def test_a_frozen_alpha_does_not_change_in_training() -> None:
    layer = layer_of()
    assert layer.raw_alpha is not None
    layer.raw_alpha.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.in_proj_weight.detach().clone()
    x = torch.randn(N, S, E)
    layer(x, x, x)[0].square().sum().backward()
    optimizer.step()
    assert layer.raw_alpha.grad is None
    assert layer.alpha.tolist() == [1.5] * H
    assert bool((layer.in_proj_weight != before).any())


@pytest.mark.parametrize("alpha_init", [(1.0, 1.5, 2.0), [1.0, 1.5, 2.0], torch.tensor([1.0, 1.5, 2.0])], ids=str)
@pytest.mark.parametrize("learn_alpha", [True, False])
def test_initial_alpha_per_head(alpha_init: Sequence[float] | Tensor, learn_alpha: bool) -> None:
    assert layer_of(alpha_init=alpha_init, learn_alpha=learn_alpha).alpha.tolist() == [1.0, 1.5, 2.0]


def test_a_fixed_alpha_can_lie_outside_the_range_and_is_not_in_the_state_dict() -> None:
    layer = layer_of(alpha_init=3.0, learn_alpha=False)
    assert layer.alpha.tolist() == [3.0] * H
    assert layer.raw_alpha is None
    dense = nn.MultiheadAttention(E, H)
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.load_state_dict(dense.state_dict(), strict=True)
    dense.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_dict_loads_strictly_and_keeps_the_initial_alpha(assign: bool) -> None:
    model = nn.ModuleDict({"attention": layer_of(alpha_init=(1.1, 1.2, 1.3))})
    dense = nn.ModuleDict({"attention": nn.MultiheadAttention(E, H)}).state_dict()
    names = list(dense)
    result = model.load_state_dict(dense, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(dense) == names  # the caller's dict is not changed
    torch.testing.assert_close(alpha_per_head(model)["attention"], torch.tensor([1.1, 1.2, 1.3]))
    torch.testing.assert_close(model["attention"].in_proj_weight, dense["attention.in_proj_weight"])
    assert isinstance(model["attention"].raw_alpha, nn.Parameter)


def test_the_state_dict_contains_alpha() -> None:
    trained, fresh = layer_of(alpha_init=(1.1, 1.2, 1.3)), layer_of()
    assert list(trained.state_dict()) == [*fresh.state_dict()]
    assert "raw_alpha" in trained.state_dict()
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh.alpha, trained.alpha, rtol=0, atol=0)
    incomplete = trained.state_dict()
    del incomplete["out_proj.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"out_proj.bias\""):
        fresh.load_state_dict(incomplete)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_alpha_stays_float32_and_gets_a_gradient(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    assert layer.raw_alpha is not None
    assert (layer.in_proj_weight.dtype, layer.raw_alpha.dtype, layer.alpha.dtype) == (dtype, *[torch.float32] * 2)
    x = torch.randn(N, S, E, dtype=dtype, requires_grad=True)
    output, weights = layer(x, x, x)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    output.float().square().sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())

    exact = layer_of(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    expected = exact(*[x.detach().double()] * 3)
    torch.testing.assert_close((output.double(), weights.double()), expected, rtol=0.05, atol=0.02)


def test_alpha_in_float64_keeps_all_digits() -> None:
    for learn_alpha in (True, False):
        layer = layer_of(alpha_init=(1.1, 1.2, 1.3), learn_alpha=learn_alpha, dtype=torch.float64)
        assert layer.alpha.dtype == torch.float64
        assert layer.alpha.tolist() == [1.1, 1.2, 1.3]


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_a_layer_can_be_built_on_the_meta_device_and_loaded(learn_alpha: bool) -> None:
    layer = layer_of(alpha_init=1.25, learn_alpha=learn_alpha, device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    trained = layer_of(alpha_init=1.75)
    state = trained.state_dict()
    if not learn_alpha:
        del state["raw_alpha"]
    layer.load_state_dict(state, assign=True)
    assert layer.alpha.tolist() == ([1.75] * H if learn_alpha else [1.25] * H)


def test_alpha_per_head_names_every_adaptive_layer() -> None:
    model = nn.ModuleDict(
        {
            "learnt": layer_of(alpha_init=(1.1, 1.2, 1.3)),
            "dense": nn.MultiheadAttention(E, H),
            "inner": nn.Sequential(layer_of(alpha_init=2.0, learn_alpha=False)),
        }
    )
    found = alpha_per_head(model)
    assert list(found) == ["learnt", "inner.0"]
    torch.testing.assert_close(found["learnt"], torch.tensor([1.1, 1.2, 1.3]))
    torch.testing.assert_close(found["inner.0"], torch.full((H,), 2.0))
    assert not any(alpha.requires_grad for alpha in found.values())
    assert alpha_per_head(nn.Linear(2, 3)) == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha_init": 2.5}, r"alpha_init must be in alpha_range \[1, 2\], got 2.5"),
        ({"alpha_init": 0.5}, r"alpha_init must be in alpha_range \[1, 2\], got 0.5"),
        ({"alpha_init": (1.0, 1.5, 2.25)}, r"alpha_init must be in alpha_range \[1, 2\], got 2.25"),
        ({"alpha_init": 1.0, "alpha_range": (1.25, 1.75)}, r"alpha_range \[1.25, 1.75\], got 1"),
        ({"alpha_init": 0.0, "learn_alpha": False}, r"alpha_init must be in \(0, inf\), got 0"),
        ({"alpha_init": math.inf, "learn_alpha": False}, r"alpha_init must be in \(0, inf\), got inf"),
        ({"alpha_init": math.nan}, r"alpha_init must be in \(0, inf\), got nan"),
        ({"alpha_init": (1.5, 1.5)}, r"alpha_init must be a number or one per head \(3,\), got shape \(2,\)"),
        ({"alpha_range": (2.0, 1.0)}, r"0 < low < high < inf, got \(2.0, 1.0\)"),
        ({"alpha_range": (0.0, 2.0)}, r"0 < low < high < inf, got \(0.0, 2.0\)"),
        ({"alpha_range": (1.0, math.inf)}, r"0 < low < high < inf, got \(1.0, inf\)"),
    ],
)
def test_a_wrong_alpha_init_or_alpha_range_raises_an_error(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(**kwargs)


def test_repr_shows_the_alpha_arguments() -> None:
    assert "alpha_init=1.25, alpha_range=(1.0, 2.0), learn_alpha=True" in repr(layer_of(alpha_init=1.25))
    assert "alpha_init=(1.0, 1.5, 2.0)" in repr(layer_of(alpha_init=(1.0, 1.5, 2.0)))


@pytest.mark.parametrize("narrow", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_alpha_stays_float32_in_a_half_precision_model(narrow: Callable[[nn.Module], nn.Module]) -> None:
    layer = AdaptiveSparseMultiheadAttention(8, 2, alpha_init=1.2345)
    parameter = layer.raw_alpha
    narrow(nn.Sequential(layer))
    assert layer.raw_alpha is parameter
    assert parameter.dtype == torch.float32 and parameter.tolist() == pytest.approx([1.2345] * 2, abs=1e-7)
    assert layer.in_proj_weight.dtype in (torch.float16, torch.bfloat16)


def test_a_layer_on_the_meta_device_takes_a_dense_checkpoint() -> None:
    dense = nn.MultiheadAttention(8, 2)
    with torch.device("meta"):
        layer = AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.25, 1.5], device="meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert layer.alpha.tolist() == [1.25, 1.5]


def test_to_empty_sets_the_initial_alpha() -> None:
    dense = nn.Sequential(nn.MultiheadAttention(8, 2))
    model = nn.Sequential(AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.25, 1.5], device="meta"))
    model.to_empty(device="cpu").load_state_dict(dense.state_dict(), strict=True)
    assert model[0].alpha.tolist() == [1.25, 1.5]
    with torch.no_grad():
        model[0].raw_alpha.fill_(1.75)
    assert model.to(torch.float64)[0].alpha.tolist() == [1.75, 1.75]


def test_reset_parameters_resets_alpha() -> None:
    layer = AdaptiveSparseMultiheadAttention(8, 2, alpha_init=[1.25, 1.5])
    with torch.no_grad():
        layer.raw_alpha.fill_(math.nan)
    layer._reset_parameters()
    assert layer.alpha.tolist() == [1.25, 1.5]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha_range": (1.0, 1.5, 2.0)}, r"alpha_range must be two numbers \(low, high\), got \(1.0, 1.5, 2.0\)"),
        ({"alpha_range": 2.0}, r"alpha_range must be two numbers \(low, high\), got 2.0"),
        ({"alpha_init": "1.5"}, "alpha_init must be a number or one per head, got '1.5'"),
        ({"alpha_init": True}, "alpha_init must be a number or one per head, got True"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"num_heads": 2.0}, "num_heads must be an int, got 2.0"),
    ],
)
def test_arguments_of_a_wrong_type_or_length_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AdaptiveSparseMultiheadAttention(**{"embed_dim": 8, "num_heads": 2, **kwargs})


def test_gradients_per_example_by_vmap():
    layer = AdaptiveSparseMultiheadAttention(6, 2, batch_first=True).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x, x, x))[0].square().sum()

    alone = torch.func.vmap(torch.func.grad(lambda p, one: loss(p, one[None])), in_dims=(None, 0))(parameters, x)
    together = torch.func.grad(loss)(parameters, x)
    for name, gradient in together.items():
        torch.testing.assert_close(alone[name].sum(0), gradient)
