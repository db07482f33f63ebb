"""The functions for α in training: groups, freezing, setting, annealing, the penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from encoders import sparse_encoder
from torch import Tensor, nn

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    Entmax,
    EntmaxLoss,
    SparseAttention,
    alpha_per_head,
)
from sparse_attn.nn.alpha import HeadAlpha
from sparse_attn.optim import (
    alpha_param_groups,
    alpha_penalty,
    check_set_alpha,
    freeze_alpha,
    linear_alpha,
    of_attention,
    project_alpha,
    set_alpha,
    unfreeze_alpha,
)

N, L, H, E, F = 3, 5, 2, 14, 11


encoder = partial(sparse_encoder, E, H, F)


class Everything(nn.Module):
    """A model with α in a layer, a mapping and a loss, a fixed α, matrices, biases, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, alpha_init=[1.2, 1.4])
        self.fixed = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, learn_alpha=False)
        self.mapping = Entmax(torch.full((H, 1, 1), 1.5), learn_alpha=True)
        self.loss = EntmaxLoss(alpha=1.6, learn_alpha=True)
        self.head = nn.Linear(E, F)
        self.tied = self.head

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0] + self.fixed(x, x, x)[0]
        scores = torch.stack([x @ x.transpose(1, 2)] * H, 1)
        return self.loss(self.head((self.mapping(scores) @ x[:, None]).sum(1)).transpose(1, 2), target)


LEARNT = ["attention.raw_alpha", "mapping.raw_alpha", "loss.raw_alpha"]


def names_of(model: nn.Module, parameters: list[Tensor]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Everything()
    model.fixed.in_proj_weight.requires_grad_(False)
    groups = alpha_param_groups(model, lr=0.25, weight_decay=0.5, alpha_lr=2.0)
    found = [names_of(model, group["params"]) for group in groups]
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for names in found for name in names) == sorted(learning)
    assert "fixed.in_proj_weight" not in learning
    assert found[2] == LEARNT
    assert {name.rpartition(".")[2] for name in found[0]} == {"in_proj_weight", "weight"}
    assert {name.rpartition(".")[2] for name in found[1]} == {"in_proj_bias", "bias"}
    settings = [(group["lr"], group["weight_decay"]) for group in groups]
    assert settings == [(0.25, 0.5), (0.25, 0.0), (2.0, 0.0)]


def test_groups_without_parameters_are_left_out() -> None:
    model = encoder()
    assert alpha_param_groups(model, lr=0.25)[2]["lr"] == 0.25
    freeze_alpha(model)
    assert len(alpha_param_groups(model, lr=0.25)) == 2
    assert len(alpha_param_groups(nn.Linear(2, 3), lr=0.25, strict=False)) == 2
    assert alpha_param_groups(nn.Linear(2, 3).requires_grad_(False), lr=0.25, strict=False) == []


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # a warning of the compiler at its first use
def test_groups_are_the_same_inside_wrappers() -> None:
    model = encoder()
    expected = [names_of(model, group["params"]) for group in alpha_param_groups(model, lr=0.1)]
    for wrapped in (torch.compile(model), nn.Sequential(model)):
        groups = alpha_param_groups(wrapped, lr=0.1)
        assert [names_of(model, group["params"]) for group in groups] == expected


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(N, L, E, generator=generator)
        optimizer.zero_grad()
        model(x).pow(3).sum().backward()
        optimizer.step()


def test_a_frozen_alpha_does_not_change_despite_momentum_and_can_be_unfrozen() -> None:
    model = encoder(alpha_init=1.3)
    optimizer = torch.optim.Adam(alpha_param_groups(model, lr=1e-2))
    train(model, optimizer)
    before = alpha_per_head(model)
    assert all((alpha != 1.3).all() for alpha in before.values())
    model(torch.randn(N, L, E)).sum().backward()  # a gradient that exists before α is frozen
    freeze_alpha(model)
    optimizer.step()
    train(model, optimizer)
    assert all(torch.equal(alpha, before[name]) for name, alpha in alpha_per_head(model).items())
    unfreeze_alpha(model)
    train(model, optimizer)
    assert all((alpha != before[name]).all() for name, alpha in alpha_per_head(model).items())


def test_set_alpha_reaches_layers_mappings_and_losses_and_keeps_the_parameters() -> None:
    model = Everything()
    before = dict(model.named_parameters())
    set_alpha(model, 1.75)
    assert {name: p for name, p in model.named_parameters()}.keys() == before.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    for module in (model.attention, model.fixed, model.mapping, model.loss):
        assert set(module.alpha.flatten().tolist()) == {1.75}
    x, target = torch.randn(N, L, E), torch.randint(F, (N, L))
    model(x, target).backward()
    assert all(model.get_parameter(name).grad is not None for name in LEARNT)


def test_set_alpha_accepts_the_result_of_alpha_per_head() -> None:
    model = encoder(alpha_init=[1.1, 1.9])
    kept = alpha_per_head(model)
    set_alpha(model, [1.25, 1.5])
    assert all(alpha.tolist() == [1.25, 1.5] for alpha in alpha_per_head(model).values())
    set_alpha(model, {"layers.1.self_attn": 2.0})
    assert [alpha.tolist() for alpha in alpha_per_head(model).values()] == [[1.25, 1.5], [2.0, 2.0]]
    set_alpha(model, kept)
    assert all(torch.equal(alpha, kept[name]) for name, alpha in alpha_per_head(model).items())
    mapping = Entmax(torch.full((H, 1, 1), 1.5))
    set_alpha(mapping, torch.tensor([1.0, 3.0]))  # a fixed α can have any value in (0, inf)
    assert mapping.raw_alpha.tolist() == [[[1.0]], [[3.0]]]


def test_set_alpha_by_the_name_of_the_module_that_holds_it() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"sparse_alpha": Entmax(1.25)}) for _ in range(2)])
    set_alpha(blocks, {"1": 1.5})
    assert [float(block["sparse_alpha"].alpha) for block in blocks] == [1.25, 1.5]
    with pytest.raises(ValueError, match="got ''"):
        set_alpha(encoder(), {"": 1.5})
    with pytest.raises(ValueError, match="got 'two'"):
        set_alpha(nn.ModuleDict({"two": nn.ModuleList([Entmax(1.25), Entmax(1.25)])}), {"two": 1.5})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.5, ValueError, r"value for 'layers.0.self_attn' must be in alpha_range \[1, 2\], got 2.5"),
        (0.0, ValueError, r"must be in \(0, inf\), got 0"),
        (math.nan, ValueError, r"must be in \(0, inf\), got nan"),
        ([1.5, 1.5, 1.5], ValueError, r"must be a number or one per head \(2,\), got shape \(3,\)"),
        ({"layers.1.self_attn": 1.5, "layers.0.self_attn": 3.0}, ValueError, r"'layers.0.self_attn' must be in"),
        ({"layers.2.self_attn": 1.5}, ValueError, r"'layers.0.self_attn', .*, got 'layers.2.self_attn'"),
        ("sparse", TypeError, "must be a number or one per head, got 'sparse'"),
        (None, TypeError, "must be a number or one per head, got None"),
        (True, TypeError, "must be a number or one per head, got True"),
    ],
)
def test_a_refused_alpha_changes_nothing(value: Any, error: type[Exception], message: str) -> None:
    model = encoder(alpha_init=1.25)
    with pytest.raises(error, match=message):
        set_alpha(model, value)
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())


def test_set_alpha_accepts_rounded_bounds() -> None:
    model = encoder(alpha_range=(1.1, 1.9), alpha_init=[1.1, 1.9])
    set_alpha(model, alpha_per_head(model))
    set_alpha(model, [1.9, 1.1])
    with pytest.raises(ValueError, match=r"got 1\.90001"):
        set_alpha(model, 1.90001)


@pytest.mark.parametrize("value", [2.5, {"layers.0.self_attn": 1.5, "layers.1.self_attn": 2.5}])
def test_a_value_can_be_checked_without_setting_it(value: Any) -> None:
    model = encoder(alpha_init=1.25)
    check_set_alpha(model, 1.75)
    with pytest.raises(ValueError, match=r"must be in alpha_range \[1, 2\], got 2.5"):
        check_set_alpha(model, value)
    fixed = Entmax(1.25)
    check_set_alpha(fixed, 1.75)
    assert fixed.raw_alpha is None
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())


def test_a_filter_can_exclude_the_alpha_of_a_loss() -> None:
    model = Everything()
    model.core = SparseAttention(alpha=1.25)
    model.block = nn.ModuleDict({"sparse_alpha": HeadAlpha(H, alpha_init=1.25)})
    set_alpha(model, 1.75, filter_fn=of_attention)
    moved = (model.attention, model.fixed, model.core, model.block["sparse_alpha"])
    assert all(set(torch.as_tensor(module.alpha).flatten().tolist()) == {1.75} for module in moved)
    assert model.loss.alpha.item() == pytest.approx(1.6) and set(model.mapping.alpha.flatten().tolist()) == {1.5}

    alpha_penalty(model, filter_fn=of_attention).backward()
    assert model.loss.raw_alpha.grad is None and model.mapping.raw_alpha.grad is None
    assert model.attention.raw_alpha.grad.tolist() == [-0.25] * H

    seen = {}
    set_alpha(model, 1.25, filter_fn=lambda name, module: seen.setdefault(name, module) is model.loss)
    assert seen["attention"] is model.attention and list(seen)[-1] == "block.sparse_alpha"
    assert model.loss.alpha.item() == 1.25 and set(model.attention.alpha.tolist()) == {1.75}
    message = r"value must name modules with an α that filter_fn accepts \(one of 'loss'\), got 'attention'"
    with pytest.raises(ValueError, match=message):
        set_alpha(model, {"attention": 1.5}, filter_fn=lambda name, module: name == "loss")
    with pytest.raises(ValueError, match=r"value must name modules with an α \(one of .*'loss'.*\), got 'decoder'"):
        set_alpha(model, {"decoder": 1.5})


@pytest.mark.parametrize(
    "call", [lambda m, f: set_alpha(m, 1.5, filter_fn=f), lambda m, f: alpha_penalty(m, filter_fn=f)]
)
def test_an_invalid_filter_or_one_that_accepts_no_module_is_refused(call: Callable[..., Any]) -> None:
    model = encoder()
    with pytest.raises(
        ValueError, match=r"filter_fn must accept at least one .* got none of 'layers.0.self_attn', 'lay"
    ):
        call(model, lambda name, module: False)
    with pytest.raises(TypeError, match="filter_fn must be a function of name and module, or None, got 'self_attn'"):
        call(model, "self_attn")
    with pytest.raises(ValueError, match=r"model must hold an α.*, got none"):
        call(nn.Linear(2, 3), of_attention)


def test_linear_alpha() -> None:
    values = [linear_alpha(step, 2.0, 1.0, first_step=3, last_step=7) for step in (-1, 0, 3, 4, 5, 7, 8)]
    assert values == [2.0, 2.0, 2.0, 1.75, 1.5, 1.0, 1.0]
    assert linear_alpha(10**9, 1.0, 1.3, last_step=7) == 1.3  # exactly


def test_linear_alpha_stays_between_its_ends() -> None:
    for last in range(2, 50):
        assert {linear_alpha(step, 1.9, 1.9, last_step=last) for step in range(last + 1)} == {1.9}
        for start, end in ((1.1, 1.9), (1.9, 1.1), (1.0, 1.0 + 2**-52)):
            line = [linear_alpha(step, start, end, last_step=last) for step in range(last + 1)]
            assert line == sorted(line, reverse=start > end) and (line[0], line[-1]) == (start, end)


@pytest.mark.parametrize("target", ["sparse", "dense", 1.5])
def test_the_penalty_equals_its_formula_and_is_zero_on_target(target: Any) -> None:
    model = Everything()  # α is 1.2, 1.4; 1.5, 1.5; 1.6, all with range [1, 2]
    shares = torch.tensor([0.2, 0.4, 0.5, 0.5, 0.6])
    formula = {"sparse": 1 - shares, "dense": shares, 1.5: (shares - 0.5).square()}[target]
    penalty = alpha_penalty(model, target, strength=3.0)
    torch.testing.assert_close(penalty, 3 * formula.mean())
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in LEARNT], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        alpha_penalty(model, target, strength=3.0).backward()
        optimizer.step()
    end = {"sparse": 2.0, "dense": 1.0, 1.5: 1.5}[target]
    for name in LEARNT:
        alpha = model.get_submodule(name.removesuffix(".raw_alpha")).alpha
        torch.testing.assert_close(alpha.detach(), torch.full_like(alpha, end))
    assert abs(alpha_penalty(model, target).item()) < 1e-6


def test_a_penalty_uses_the_range_of_each_module() -> None:
    model = nn.ModuleList(Entmax(alpha, learn_alpha=True, alpha_range=(1.0, high)) for alpha, high in [(2, 5), (2, 3)])
    assert alpha_penalty(model, "dense").item() == pytest.approx((0.25 + 0.5) / 2)


def test_a_penalty_in_a_functional_call() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder(alpha_init=1.25)

        def forward(self) -> Tensor:
            return alpha_penalty(self.inner, "sparse")

    model = Penalised()
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, ()))(dict(model.named_parameters()))
    assert grads["inner.layers.0.self_attn.raw_alpha"].tolist() == [-0.25] * H


def test_a_penalty_moves_alpha_during_training() -> None:
    ends = []
    for strength in (0.0, 100.0):
        torch.manual_seed(0)
        model = encoder(alpha_init=1.5)
        optimizer = torch.optim.SGD(alpha_param_groups(model, lr=0.0, alpha_lr=0.01))
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.randn(N, L, E)).sum() + alpha_penalty(model, strength=strength)).backward()
            optimizer.step()
        ends.append(torch.cat(list(alpha_per_head(model).values())))
    assert bool((ends[1] > ends[0] + 0.4).all())


FIXED = [lambda: encoder(learn_alpha=False), lambda: Entmax(1.5)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: alpha_param_groups(m, lr=0.1), "model must hold an α that is a parameter"),
        (freeze_alpha, "model must hold an α that is a parameter"),
        (unfreeze_alpha, "model must hold an α that is a parameter"),
        (project_alpha, "model must hold an α that is a parameter"),
        (alpha_penalty, "model must hold an α that is a parameter"),
    ],
)
def test_a_model_without_a_learnt_alpha_is_refused(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message + r".*got none"):
        call(nn.Linear(2, 3))
    for make in FIXED:
        with pytest.raises(ValueError, match=message + r".*got fixed α only"):
            call(make())
    with pytest.raises(ValueError, match="model must hold an α, got none in Linear"):
        set_alpha(nn.Linear(2, 3), 1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: alpha_param_groups(m, lr=-0.1), "lr must be at least 0, got -0.1"),
        (lambda m: alpha_param_groups(m, lr=math.nan), "lr must be at least 0, got nan"),
        (lambda m: alpha_param_groups(m, lr=0.1, weight_decay=-1), "weight_decay must be at least 0, got -1"),
        (lambda m: alpha_param_groups(m, lr=0.1, alpha_lr=-1), "alpha_lr must be at least 0, got -1"),
        (lambda m: alpha_param_groups(m, lr=torch.ones(2)), r"lr must be one number, got a tensor of shape \(2,\)"),
        (lambda m: alpha_penalty(m, strength=-1.0), r"strength must be in \[0, inf\), got -1.0"),
        (lambda m: alpha_penalty(m, strength=math.nan), r"strength must be in \[0, inf\), got nan"),
        (lambda m: alpha_penalty(m, "sparser"), "target must be 'sparse', 'dense' or a number, got 'sparser'"),
        (lambda m: alpha_penalty(m, 2.5), r"target must be in alpha_range \[1, 2\], got 2.5"),
        (lambda m: linear_alpha(1, 1.0, 2.0, first_step=7, last_step=5), "last_step must be above .*, got 5 and 7"),
        (lambda m: linear_alpha(1, 1.0, 2.0, last_step=0), "last_step must be above first_step, got 0 and 0"),
        (lambda m: linear_alpha(math.nan, 1.0, 2.0, last_step=5), "^step must be finite, got nan"),
        (lambda m: linear_alpha(math.inf, 1.0, 2.0, last_step=5), "^step must be finite, got inf"),
        (lambda m: linear_alpha(1, 1.0, 2.0, last_step=math.inf), "^last_step must be finite, got inf"),
        (
            lambda m: linear_alpha(1, 1.0, 2.0, first_step=-math.inf, last_step=5),
            "^first_step must be finite, got -inf",
        ),
        (lambda m: linear_alpha(1, 0.0, 2.0, last_step=5), r"start must be in \(0, inf\), got 0.0"),
        (lambda m: linear_alpha(1, 1.0, math.inf, last_step=5), r"end must be in \(0, inf\), got inf"),
    ],
)
def test_invalid_arguments_raise_an_error(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(encoder())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda _, f=f: f(None), "model must be a torch.nn.Module, got NoneType")
            for f in (alpha_per_head, freeze_alpha, unfreeze_alpha, project_alpha, alpha_penalty)
        ),
        (lambda _: set_alpha([], 1.5), "model must be a torch.nn.Module, got list"),
        (lambda _: alpha_param_groups(None, lr=0.1, strict=False), "model must be a torch.nn.Module, got NoneType"),
        (lambda m: alpha_param_groups(m, lr="x"), "lr must be a number or a floating tensor, got str"),
        (lambda m: alpha_param_groups(m, lr=0.1, alpha_lr="x"), "alpha_lr must be a number or .*, got str"),
        (lambda m: alpha_param_groups(m, lr=0.1, weight_decay=None), "weight_decay must be a number .*, got NoneType"),
        (lambda m: alpha_param_groups(m, lr=0.1, strict="no"), "strict must be True or False, got 'no'"),
        (lambda m: alpha_penalty(m, strength="x"), "strength must be a number or a floating tensor, got str"),
        (lambda m: alpha_penalty(m, None), "target must be a number, got None"),
        (lambda m: alpha_penalty(m, torch.tensor([1.25, 1.5])), r"target must be a number, got tensor\(\[1.25"),
        (lambda _: linear_alpha(1, 1.0, 2.0, last_step="9"), "last_step must be a number, got '9'"),
        (lambda _: linear_alpha(1, 1.0, 2.0, first_step=None, last_step=9), "first_step must be a number, got None"),
        (lambda _: linear_alpha("1", 1.0, 2.0, last_step=9), "step must be a number, got '1'"),
        (lambda _: encoder(learn_alpha="no"), "learn_alpha must be True or False, got 'no'"),
        (lambda _: Entmax(1.5, learn_alpha="no"), "learn_alpha must be True or False, got 'no'"),
        (lambda _: EntmaxLoss(1.5, learn_alpha=None), "learn_alpha must be True or False, got None"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(call: Callable[[nn.Module], Any], message: str) -> None:
    model = encoder()
    with pytest.raises(TypeError, match=message):
        call(model)
