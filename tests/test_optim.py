"""α in training: groups, freezing, setting, annealing, the penalty; under compile, EMA, LoRA and mixed dtypes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    Entmax,
    EntmaxLoss,
    SparseAttention,
    alpha_per_head,
    replace_attention,
)
from sparse_attn.nn.alpha import HeadAlpha, WideAlpha
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

# Raised inside torch, on its own account, when something is compiled for the first time.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

N, L, H, E, F = 3, 5, 2, 14, 11


def encoder(layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, F, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    replace_attention(model, **kwargs)
    return model


class Everything(nn.Module):
    """α in a layer, a mapping and a loss, beside a fixed one and parameters of every kind."""

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


def test_groups_without_a_learning_alpha_are_left_out() -> None:
    model = encoder()
    assert alpha_param_groups(model, lr=0.25)[2]["lr"] == 0.25
    freeze_alpha(model)
    assert len(alpha_param_groups(model, lr=0.25)) == 2
    assert len(alpha_param_groups(nn.Linear(2, 3), lr=0.25, strict=False)) == 2
    assert alpha_param_groups(nn.Linear(2, 3).requires_grad_(False), lr=0.25, strict=False) == []


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


def test_frozen_alpha_stays_whatever_the_momentum_and_learns_again() -> None:
    model = encoder(alpha_init=1.3)
    optimizer = torch.optim.Adam(alpha_param_groups(model, lr=1e-2))
    train(model, optimizer)
    before = alpha_per_head(model)
    assert all((alpha != 1.3).all() for alpha in before.values())
    model(torch.randn(N, L, E)).sum().backward()  # a gradient that is there when it is frozen
    freeze_alpha(model)
    optimizer.step()
    train(model, optimizer)
    assert all(torch.equal(alpha, before[name]) for name, alpha in alpha_per_head(model).items())
    unfreeze_alpha(model)
    train(model, optimizer)
    assert all((alpha != before[name]).all() for name, alpha in alpha_per_head(model).items())


def test_set_alpha_reaches_every_kind_and_keeps_the_parameters() -> None:
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


def test_set_alpha_per_head_and_by_name_takes_back_what_alpha_per_head_gave() -> None:
    model = encoder(alpha_init=[1.1, 1.9])
    kept = alpha_per_head(model)
    set_alpha(model, [1.25, 1.5])
    assert all(alpha.tolist() == [1.25, 1.5] for alpha in alpha_per_head(model).values())
    set_alpha(model, {"layers.1.self_attn": 2.0})
    assert [alpha.tolist() for alpha in alpha_per_head(model).values()] == [[1.25, 1.5], [2.0, 2.0]]
    set_alpha(model, kept)
    assert all(torch.equal(alpha, kept[name]) for name, alpha in alpha_per_head(model).items())
    mapping = Entmax(torch.full((H, 1, 1), 1.5))
    set_alpha(mapping, torch.tensor([1.0, 3.0]))  # fixed: any in (0, inf)
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
    ],
)
def test_a_refused_alpha_changes_nothing(value: Any, error: type[Exception], message: str) -> None:
    model = encoder(alpha_init=1.25)
    with pytest.raises(error, match=message):
        set_alpha(model, value)
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())


def test_set_alpha_takes_bounds_that_are_rounded() -> None:
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


def test_a_filter_leaves_the_alpha_of_a_loss_to_the_objective() -> None:
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
    with pytest.raises(ValueError, match="value must be for modules with an α, 'loss', got 'attention'"):
        set_alpha(model, {"attention": 1.5}, filter_fn=lambda name, module: name == "loss")


@pytest.mark.parametrize(
    "call", [lambda m, f: set_alpha(m, 1.5, filter_fn=f), lambda m, f: alpha_penalty(m, filter_fn=f)]
)
def test_a_filter_that_accepts_nothing_or_is_none(call: Callable[..., Any]) -> None:
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


@pytest.mark.parametrize("target", ["sparse", "dense", 1.5])
def test_the_penalty_is_its_formula_and_zero_on_target(target: Any) -> None:
    model = Everything()  # α 1.2, 1.4; 1.5, 1.5; 1.6, all of range [1, 2]
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


def test_a_penalty_uses_each_range() -> None:
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


def test_a_penalty_moves_alpha_in_a_training() -> None:
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
def test_a_model_without_a_learnt_alpha(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message + r".*got none"):
        call(nn.Linear(2, 3))
    for make in FIXED:
        with pytest.raises(ValueError, match=message + r".*got fixed ones alone"):
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
        (lambda m: alpha_penalty(m, strength=-1.0), r"strength must be in \[0, inf\), got -1.0"),
        (lambda m: alpha_penalty(m, strength=math.nan), r"strength must be in \[0, inf\), got nan"),
        (lambda m: alpha_penalty(m, "sparser"), "target must be 'sparse', 'dense' or a number, got 'sparser'"),
        (lambda m: alpha_penalty(m, 2.5), r"target must be in alpha_range \[1, 2\], got 2.5"),
        (lambda m: linear_alpha(1, 1.0, 2.0, first_step=7, last_step=5), "last_step must be above .*, got 5 and 7"),
        (lambda m: linear_alpha(1, 1.0, 2.0, last_step=0), "last_step must be above first_step, got 0 and 0"),
        (lambda m: linear_alpha(1, 0.0, 2.0, last_step=5), r"start must be in \(0, inf\), got 0.0"),
        (lambda m: linear_alpha(1, 1.0, math.inf, last_step=5), r"end must be in \(0, inf\), got inf"),
    ],
)
def test_wrong_arguments(call: Callable[[nn.Module], Any], message: str) -> None:
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
        (lambda m: alpha_penalty(m, strength="x"), "strength must be a number or a floating tensor, got str"),
        (lambda m: alpha_penalty(m, None), "target must be a number or a floating tensor, got NoneType"),
        (lambda _: linear_alpha(1, 1.0, 2.0, last_step="9"), "last_step must be a number, got '9'"),
        (lambda _: linear_alpha(1, 1.0, 2.0, first_step=None, last_step=9), "first_step must be a number, got None"),
        (lambda _: linear_alpha("1", 1.0, 2.0, last_step=9), "step must be a number, got '1'"),
        (lambda _: encoder(learn_alpha="no"), "learn_alpha must be True or False, got 'no'"),
        (lambda _: Entmax(1.5, learn_alpha="no"), "learn_alpha must be True or False, got 'no'"),
        (lambda _: EntmaxLoss(1.5, learn_alpha=None), "learn_alpha must be True or False, got None"),
    ],
)
def test_arguments_of_another_type(call: Callable[[nn.Module], Any], message: str) -> None:
    model = encoder()
    with pytest.raises(TypeError, match=message):
        call(model)


# In company


@pytest.mark.parametrize("kind", ["learnt", "learnt, projected, with a penalty", "fixed, annealed"])
def test_a_compiled_training_step_never_recompiles_while_alpha_moves(kind: str) -> None:
    learnt = kind.startswith("learnt")
    model = encoder(layers=1, learn_alpha=learnt, alpha_init=1.0).double()
    set_alpha(model, 1.0)  # before the first trace: a fixed number becomes a buffer
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).pow(3).sum() + (alpha_penalty(model, strength=20.0) if "penalty" in kind else 0.0)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    seen = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(5):
        x = torch.randn(N, L, E, dtype=torch.float64)
        for m, function, optimizer in zip((model, twin), (compiled, loss), optimizers, strict=True):
            optimizer.zero_grad()
            function(m, x).backward()
            optimizer.step()
            if "projected" in kind:
                project_alpha(m)
            if not learnt:
                set_alpha(m, linear_alpha(step + 1, 1.0, 1.5, last_step=4))
        (alpha,) = alpha_per_head(model).values()
        seen.append(tuple(alpha.tolist()))
        torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert counter.frame_count == 1
    assert len(set(seen)) > 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    model = encoder(alpha_init=[1.0, 1.7])
    x = torch.randn(N, L, E, requires_grad=True)
    model(x).pow(3).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    y = x
    for layer in model.layers:
        y = checkpoint(layer, y, use_reentrant=use_reentrant)
    y.pow(3).sum().backward()
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_accumulated_gradients_take_the_steps_of_the_joined_batch() -> None:
    models = [encoder(alpha_init=[1.0, 2.0]).double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(alpha_param_groups(m, lr=1e-2, weight_decay=0.1)) for m in models]
    for m, optimizer in zip(models, optimizers, strict=True):
        optimizer.register_step_post_hook(lambda *_, m=m: project_alpha(m))
    for _ in range(7):
        x = torch.randn(6, L, E, dtype=torch.float64)
        for parts, m, optimizer in zip((1, 3), models, optimizers, strict=True):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                m(part).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(*[dict(m.named_parameters()) for m in models])
    alphas = torch.stack(list(alpha_per_head(models[0]).values()))
    assert bool((alphas != torch.tensor([1.0, 2.0])).any()), "some head has left its bound"


def test_an_averaged_model_averages_alpha() -> None:
    model = encoder(alpha_init=1.5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(alpha_param_groups(model, lr=0.0, alpha_lr=0.01))
    expected = torch.full((2, H), 1.5)
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        expected = 0.75 * expected + 0.25 * torch.stack(list(alpha_per_head(model).values()))
    found = alpha_per_head(averaged)
    assert list(found) == ["module.layers.0.self_attn", "module.layers.1.self_attn"]
    torch.testing.assert_close(torch.stack(list(found.values())), expected)
    assert bool((expected != 1.5).all())


def test_an_averaged_model_follows_an_annealed_alpha() -> None:
    model = encoder(learn_alpha=False)
    set_alpha(model, 1.0)
    averaged = AveragedModel(model)
    set_alpha(model, 1.25)
    averaged.update_parameters(model)
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(averaged).values())


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_every_kind_of_optimizer_takes_a_bfloat16_model_with_a_float32_alpha(
    make_optimizer: type[torch.optim.Optimizer], how: dict[str, bool]
) -> None:
    model = encoder(alpha_init=1.5).bfloat16()
    optimizer = make_optimizer(alpha_param_groups(model, lr=1e-3), **how)
    mixed = make_optimizer(model.parameters(), lr=1e-3, **how)  # all dtypes in one group
    for each in (optimizer, mixed):
        before = alpha_per_head(model)
        each.zero_grad()
        model(torch.randn(N, L, E, dtype=torch.bfloat16)).float().pow(3).sum().backward()
        norm = clip_grad_norm_(model.parameters(), 0.5, foreach=how.get("foreach"))
        assert bool(norm.isfinite())
        total = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        assert total.item() == pytest.approx(0.5, rel=0.02)
        each.step()
        for name, alpha in alpha_per_head(model).items():
            assert alpha.dtype == torch.float32 and bool((alpha != before[name]).all())


class LowRank(nn.Module):
    """A weight with a learnt change of rank 2."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def test_a_parametrised_in_projection() -> None:
    model = encoder(layers=1)
    layer = model.layers[0].self_attn
    plain = copy.deepcopy(model)
    model.requires_grad_(False)
    change = LowRank(3 * E, E)
    parametrize.register_parametrization(layer, "in_proj_weight", change)
    unfreeze_alpha(model)
    plain.layers[0].self_attn.in_proj_weight = nn.Parameter(layer.in_proj_weight.detach().clone())
    x = torch.randn(N, L, E)
    torch.testing.assert_close(model(x), plain(x))
    groups = alpha_param_groups(model, lr=0.1, weight_decay=0.5)
    assert [len(group["params"]) for group in groups] == [2, 1]
    model(x).pow(3).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    parametrize.remove_parametrizations(layer, "in_proj_weight")
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


class Block(nn.Module):
    """One's own block, which calls its attention and asks it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, alpha_init=1.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (encoder, {"target_modules": ["out_proj", "linear1"]}),
        (Block, {"target_modules": ["out_proj"]}),
        (Block, {"target_modules": ["out_proj"], "target_parameters": ["attention.in_proj_weight"]}),
    ],
    ids=["encoder", "block", "block with in_proj_weight"],
)
def test_lora(make: Callable[[], nn.Module], targets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, init_lora_weights=False, **targets))
    assert not any(module.raw_alpha.requires_grad for module in model.modules() if isinstance(module, WideAlpha))
    unfreeze_alpha(model)
    x = torch.randn(N, L, E)
    before, output = alpha_per_head(model), model(x)
    optimizer = torch.optim.SGD(alpha_param_groups(model, lr=1e-3))
    output.pow(3).sum().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.any()) for grad in learning.values())
    kinds = {"lora_A", "lora_B", "raw_alpha"}
    assert all(len(kinds & set(name.split("."))) == 1 for name in learning)
    optimizer.step()
    assert all(bool((alpha != before[name]).all()) for name, alpha in alpha_per_head(model).items())

    model.eval()
    with torch.no_grad():
        trained = model(x)
        assert bool((trained != output).any())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), trained)


class Projected(nn.Module):
    """A projection for adapters, an attention of ours, and one of others with an α of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(E, E)
        self.inner = nn.Sequential(AdaptiveSparseMultiheadAttention(E, H, alpha_init=1.25))
        self.other = nn.Module()
        self.other.sparse_alpha = HeadAlpha(H, alpha_init=1.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.inner[0](x, x, x)[0] * self.other.sparse_alpha.alpha.sum()


@pytest.mark.parametrize("saved", [["sparse_alpha", "inner.0"], ["sparse_alpha", "inner"]])
def test_what_peft_keeps_beside_a_saved_module_does_not_count(saved: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=saved)
    model = peft.get_peft_model(Projected(), config)
    prefix = "base_model.model."
    assert list(alpha_per_head(model)) == [prefix + "inner.0", prefix + "other"]
    dead = [p for name, p in model.named_parameters() if "original_module" in name and "raw_alpha" in name]
    assert len(dead) == 2

    unfreeze_alpha(model)
    assert not any(p.requires_grad for p in dead)
    assert len(alpha_param_groups(model, lr=0.1)[-1]["params"]) == 2
    alpha_penalty(model).backward()
    live = [p for name, p in model.named_parameters() if "modules_to_save" in name and "raw_alpha" in name]
    assert [p.grad.tolist() for p in live if p.grad is not None] == [[-0.25] * H] * 2

    kept = alpha_per_head(model)
    set_alpha(model, 1.75)
    assert all(p.tolist() == [1.75] * H for p in live) and all(p.tolist() == [1.25] * H for p in dead)
    set_alpha(model, kept)
    assert all(p.tolist() == [1.25] * H for p in live)

    model.add_adapter("second", config)
    set_alpha(model, 1.5)
    model.set_adapter("second")
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())
    set_alpha(model, 1.875)
    with model.disable_adapter():
        assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())
    model.set_adapter("default")
    assert all(alpha.tolist() == [1.5] * H for alpha in alpha_per_head(model).values())
    merged = model.merge_and_unload()
    assert {name: alpha.tolist() for name, alpha in alpha_per_head(merged).items()} == {
        "inner.0": [1.5] * H,
        "other": [1.5] * H,
    }


def test_lora_on_a_whole_attention_is_refused_by_peft() -> None:
    # Its wrapper merges weights around nn.MultiheadAttention, and asks for the attribute that we set to False.
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        peft.get_peft_model(encoder(), peft.LoraConfig(r=2, target_modules=["self_attn"]))
