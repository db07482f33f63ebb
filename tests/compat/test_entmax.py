from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
from functools import partial
from types import ModuleType

import entmax as peer
import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

import sparse_attn
from sparse_attn.compat import entmax as ours


def public(module: ModuleType) -> set[str]:
    """The functions and classes that a module of the package defines, without names from torch."""
    named = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    return {name for name, value in named.items() if value.__module__.startswith("entmax")}


NAMES = sorted(public(peer))
LOSSES = sorted(name for name in NAMES if name.endswith("Loss"))
# In the development version of the package, these functions have one more argument, at the end.
GROWN = {"sparsemax", "entmax15", "Sparsemax", "Entmax15"}


def test_public_names():
    assert sorted(ours.__all__) == NAMES
    assert len(NAMES) == 22
    for name in NAMES:
        assert inspect.getdoc(getattr(ours, name))


@pytest.mark.parametrize("module", ["activations", "losses", "root_finding"])
def test_every_name_is_in_the_same_module_as_in_the_package(module):
    there, here = (importlib.import_module(f"{package.__name__}.{module}") for package in (peer, ours))
    names = {name for name in public(there) if getattr(there, name).__module__ == there.__name__} & set(NAMES)
    assert len(names) > 3
    for name in names:
        assert getattr(here, name) is getattr(ours, name)


def arguments(of):
    return [(p.name, p.kind, p.default) for p in inspect.signature(of).parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    there, here = arguments(getattr(peer, name)), arguments(getattr(ours, name))
    if name in GROWN:
        assert here.pop() == ("return_support_size", inspect.Parameter.POSITIONAL_OR_KEYWORD, False)
    assert here == there
    if inspect.isclass(getattr(peer, name)):
        assert arguments(getattr(ours, name).forward) == arguments(getattr(peer, name).forward)


def test_documented_examples():
    close = partial(torch.testing.assert_close, atol=5e-5, rtol=0)
    x = torch.tensor([-2, 0, 0.5])
    close(ours.entmax_bisect(x, 1, dim=0), torch.tensor([0.0486, 0.3592, 0.5922]))
    close(ours.sparsemax(x, dim=0), torch.tensor([0, 0.25, 0.75]))
    close(ours.entmax15(x, dim=0), torch.tensor([0, 0.3260, 0.6740]))
    close(ours.normmax_bisect(x, alpha=2, dim=0), torch.tensor([0, 0.3110, 0.6890]))
    close(ours.normmax_bisect(x, alpha=1000, dim=0), torch.tensor([0, 0.4997, 0.5003]))
    close(ours.budget_bisect(x, budget=2, dim=0), torch.tensor([0.0, 1, 1]))
    x = torch.tensor([[-1, 0, 0.5], [1, 2, 3.5]])
    alpha = torch.tensor(1.33, requires_grad=True)
    p = ours.entmax_bisect(x, alpha)
    close(p, torch.tensor([[0.0460, 0.3276, 0.6264], [0.0026, 0.1012, 0.8963]]))
    close(grad(p[0, 0], alpha), (torch.tensor(-0.2562),))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sparsemax", {}),
        ("entmax15", {}),
        ("sparsemax_bisect", {}),
        ("entmax_bisect", {}),
        ("entmax_bisect", {"alpha": 1.25}),
        ("entmax_bisect", {"alpha": torch.tensor(2)}),  # an integer tensor
        ("normmax_bisect", {}),
        ("normmax_bisect", {"alpha": 1.25}),
        ("normmax_bisect", {"alpha": torch.tensor([[1.5], [2.0], [7.0]]).double()}),
        ("budget_bisect", {}),
        ("budget_bisect", {"budget": torch.tensor([[1], [2], [3]])}),
    ],
)
@pytest.mark.parametrize("dim", [0, -1])
def test_mappings_agree_with_the_package_where_it_is_correct(name, given, dim):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    columns = x if dim else x.T
    upstream = torch.randn_like(columns)
    if not dim:
        given = {key: value.T if getattr(value, "ndim", 0) else value for key, value in given.items()}
    there, here = (getattr(package, name)(columns, dim=dim, **given) for package in (peer, ours))
    torch.testing.assert_close(here, there, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad(here, x, upstream), grad(there, x, upstream), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "given"), [*((name, ()) for name in LOSSES), ("NormmaxBisectLoss", (5.0,))])
@pytest.mark.parametrize("reduction", ["elementwise_mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_losses_agree_with_the_package_where_it_is_correct(name, given, reduction, ignore_index):
    x = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    target = torch.arange(13) % 7
    there, here = (
        getattr(package, name)(*given, ignore_index=ignore_index, reduction=reduction)(x, target)
        for package in (peer, ours)
    )
    torch.testing.assert_close(here, there, atol=1e-12, rtol=0)
    upstream = torch.randn_like(here)
    torch.testing.assert_close(grad(here, x, upstream), grad(there, x, upstream), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_loss")])
def test_functional_losses_return_one_value_per_sample(name):
    x, target = torch.randn(13, 7, dtype=torch.float64), torch.arange(13) % 7
    losses = getattr(ours, name)(x, target)
    assert losses.shape == (13,)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses, getattr(peer, name)(x, target), atol=1e-12, rtol=0)
    target[4] = -100
    assert getattr(ours, name)(x, target)[4] == 0


def test_tuning_arguments_of_the_package_have_no_effect():
    x, target = torch.randn(5, 11), torch.arange(5)
    for k in (None, 1, 100):
        assert torch.equal(ours.sparsemax(x, k=k), ours.sparsemax(x))
        assert torch.equal(ours.Entmax15(k=k)(x), ours.entmax15(x))
        assert torch.equal(ours.sparsemax_loss(x, target, k=k), ours.sparsemax_loss(x, target))
        assert torch.equal(ours.entmax15_loss(x, target, k), ours.entmax15_loss(x, target))
    for n_iter in (None, 1, 100):
        assert torch.equal(ours.entmax_bisect(x, n_iter=n_iter, ensure_sum_one=False), ours.entmax_bisect(x))
        assert torch.equal(ours.BudgetBisect(n_iter=n_iter)(x), ours.budget_bisect(x))
        assert torch.equal(ours.normmax_bisect_loss(x, target, n_iter=n_iter), ours.normmax_bisect_loss(x, target))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: ours.sparsemax(x, k=2.0), TypeError, "k must be None or an int, got float"),
        (lambda x, y: ours.Entmax15(k=0), ValueError, "k must be None or at least 1, got 0"),
        (lambda x, y: ours.entmax_bisect(x, n_iter=True), TypeError, "n_iter must be None or an int, got bool"),
        (lambda x, y: ours.SparsemaxBisectLoss(n_iter=0), ValueError, "n_iter must be None or at least 1, got 0"),
        (lambda x, y: ours.entmax_bisect(x, 0), ValueError, "alpha must be in"),
        (lambda x, y: ours.normmax_bisect(x, 0.0), ValueError, "alpha must be in"),
        (lambda x, y: ours.normmax_bisect(x, torch.tensor(math.nan)), ValueError, "alpha must be in"),
        (lambda x, y: ours.normmax_bisect(x, "2"), TypeError, "alpha must be a number"),
        (lambda x, y: ours.budget_bisect(x, -1), ValueError, "budget must be in"),
        (lambda x, y: ours.budget_bisect(x, 6), ValueError, "budget must be in"),
        (lambda x, y: ours.SparsemaxLoss(reduction="max"), ValueError, "reduction must be one of elementwise_mean"),
        (lambda x, y: ours.SparsemaxLoss(ignore_index=1.5), TypeError, "ignore_index must be an int, got float"),
        (lambda x, y: ours.sparsemax(x, k=torch.tensor(2.5)), TypeError, "k must be None or an int, got Tensor of "),
        (
            lambda x, y: ours.normmax_bisect_loss(x, y + 4),
            IndexError,
            "in .0, 4. or ignore_index .-100., got 5",
        ),
        (lambda x, y: ours.normmax_bisect_loss(x, y[:2]), ValueError, "target must have shape .3,."),
        (lambda x, y: ours.normmax_bisect_loss(x, x), ValueError, "X must be .n, C. and target .n,., got .3, 5. and"),
        (lambda x, y: ours.normmax_bisect_loss(x, y.double()), TypeError, "target must be int64"),
        (lambda x, y: ours.normmax_bisect_loss(x.long(), y), TypeError, "x must have a floating dtype"),
    ],
)
def test_invalid_arguments_raise_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5), torch.arange(3))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_support_size_is_returned_with_the_probabilities(dim):
    x = 2 * torch.randn(5, 7)
    for function, module in ((ours.sparsemax, ours.Sparsemax), (ours.entmax15, ours.Entmax15)):
        for p, support in (
            function(x, dim, None, True),
            module(dim=dim, return_support_size=True)(x),
        ):
            assert torch.equal(p, function(x, dim=dim))
            assert torch.equal(support, (p > 0).sum(dim, keepdim=True))


def test_private_functions_return_threshold_and_support():
    # The package's tests call these functions. `x` holds the scores, or half the scores for 1.5-entmax.
    x = torch.randn(5, 7, dtype=torch.float64)
    for name in ("_sparsemax_threshold_and_support", "_entmax_threshold_and_support"):
        there, here = (getattr(package.activations, name)(x, dim=0) for package in (peer, ours))
        torch.testing.assert_close(here, there, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
def test_normmax_is_one_hot_if_the_norm_is_not_convex(alpha):
    def objective(p):
        return (p * x).sum(-1) - (p**alpha).sum(-1) ** (1 / alpha)

    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    p = ours.normmax_bisect(x, alpha)
    others = torch.distributions.Dirichlet(torch.full((7,), 0.3, dtype=torch.float64)).sample((1000,))
    assert (objective(others) <= objective(p) + 1e-12).all()
    torch.testing.assert_close(p, ours.normmax_bisect(x, 1.0 + 1e-9))  # the limit from above
    assert (grad(p, x, torch.randn_like(p))[0] == 0).all()
    assert ours.normmax_bisect(torch.tensor([1.0, 2.0, 2.0, -math.inf]), alpha).tolist() == [0, 1, 0, 0]
    assert ours.normmax_bisect(torch.full((3,), -math.inf), alpha).tolist() == [0, 0, 0]
    rows = torch.stack([x, x])
    mixed = ours.normmax_bisect(rows, torch.tensor([[alpha], [2.0]], requires_grad=True))
    torch.testing.assert_close(mixed, torch.stack([p, sparse_attn.normmax(x)]))


def test_normmax_passes_gradcheck_also_for_alpha_below_one():
    # The inputs are those of the package's `test_budget_grad_multiple_k`, which is flaky: for α below 1 the package
    # returns noise.
    def passes(function, seed):
        torch.manual_seed(seed)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        alpha = 6 * torch.rand((4, 1), dtype=torch.float64)
        return gradcheck(function, (x, alpha), eps=1e-5, raise_exception=False), bool((alpha > 1).all())

    for seed in range(5):
        there, above_one = passes(peer.normmax_bisect, seed)
        assert there == above_one
        assert passes(ours.normmax_bisect, seed)[0]


def test_a_budget_of_zero():
    x = torch.randn(3, 5, requires_grad=True)
    for budget in (0, 0.0, torch.tensor(0)):
        p = ours.budget_bisect(x, budget)
        assert (p == 0).all()
        assert (grad(p.sum(), x)[0] == 0).all()
    budget = torch.tensor([[0.0], [1.0], [5.0]], requires_grad=True)
    torch.testing.assert_close(ours.budget_bisect(x, budget).sum(-1, keepdim=True), budget)


def test_normmax_loss_has_first_and_second_derivatives():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -100, 6, 1])
    for alpha in (torch.tensor(1.7), torch.tensor([[0.7], [1.2], [2.0], [3.3], [1.0]]), torch.tensor(4.0)):
        alpha = alpha.double().requires_grad_()
        assert gradcheck(ours.normmax_bisect_loss, (x, target, alpha))
        assert gradgradcheck(ours.normmax_bisect_loss, (x, target, alpha))
    (slope,) = grad(ours.normmax_bisect_loss(x, target).sum(), x)
    expected = ours.normmax_bisect(x) - nn.functional.one_hot(target.clamp(min=0), 7)
    expected[2] = 0
    torch.testing.assert_close(slope, expected)


def test_normmax_loss_of_difficult_scores():
    inf = math.inf
    x = torch.tensor([[0.0, 3e7, -inf], [0.0, 3e7, -inf], [1.0, -inf, 0.5], [math.nan, inf, 1.0]], requires_grad=True)
    losses = ours.normmax_bisect_loss(x, torch.tensor([1, 0, 1, -100]), 1.5)
    assert losses.tolist() == [0, 3e7, inf, 0]
    (slope,) = grad(losses[[0, 1, 3]].sum(), x)
    assert slope.tolist() == [[0, 0, 0], [-1, 1, 0], [0, 0, 0], [0, 0, 0]]
    for dtype, rounding in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(5, 101).to(dtype)
        half = ours.normmax_bisect_loss(x, torch.arange(5))
        assert half.dtype == dtype
        torch.testing.assert_close(
            half.double(), ours.normmax_bisect_loss(x.double(), torch.arange(5)), atol=0, rtol=rounding
        )


@pytest.mark.parametrize("name", ["EntmaxBisect", "NormmaxBisect", "EntmaxBisectLoss", "NormmaxBisectLoss"])
def test_a_parameter_of_a_module_gets_gradients(name):
    layer = getattr(ours, name)(alpha=nn.Parameter(torch.tensor(1.3)))
    assert [name for name, _ in layer.named_parameters()] == ["alpha"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    arguments = (torch.randn(5, 7), torch.arange(5))[: 1 + name.endswith("Loss")]
    before = layer(*arguments).square().sum()
    before.backward()
    optimizer.step()
    assert layer(*arguments).square().sum() < before


@pytest.mark.parametrize("name", [name for name in NAMES if name[0].isupper()])
def test_modules_are_pickled_and_copied(name):
    layer = getattr(ours, name)()
    arguments = (torch.randn(5, 7), torch.arange(5))[: 1 + name.endswith("Loss")]
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(*arguments), layer(*arguments))
    assert not layer.state_dict()
