from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparse_attn
from sparse_attn import (
    BudgetSparsemax,
    Entmax,
    Entmax15,
    Normmax,
    Sparsemax,
    SparseSoftmax,
    TopkSoftmax,
)

TWINS = [
    (Sparsemax(0), sparse_attn.sparsemax, {"dim": 0}),
    (Entmax15(1), sparse_attn.entmax15, {"dim": 1}),
    (Entmax(1.3, 0), sparse_attn.entmax, {"alpha": 1.3, "dim": 0}),
    (Normmax(3.0, 0), sparse_attn.normmax, {"alpha": 3.0, "dim": 0}),
    (BudgetSparsemax(1.5, 0), sparse_attn.budget_sparsemax, {"budget": 1.5, "dim": 0}),
    (TopkSoftmax(2, 0), sparse_attn.topk_softmax, {"k": 2, "dim": 0}),
    (SparseSoftmax(2, 0), sparse_attn.sparse_softmax, {"k": 2, "dim": 0}),
]


@pytest.mark.parametrize(("module", "function", "arguments"), TWINS)
def test_a_module_equals_its_function(module, function, arguments):
    x = torch.randn(5, 7)
    assert torch.equal(module(x), function(x, **arguments))
    assert not module.state_dict()
    again = eval(repr(module), vars(sparse_attn))  # repr is the constructor call
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize(("kind", "name"), [(Entmax, "raw_alpha"), (Normmax, "alpha"), (BudgetSparsemax, "budget")])
def test_a_tensor_becomes_a_buffer_and_a_parameter_is_learnt(kind, name):
    x = torch.randn(3, 5)
    values = torch.tensor([[1.2], [1.5], [1.9]])
    fixed = kind(values)
    values += 0.05  # changes only the given tensor: the module has a copy
    assert list(fixed.state_dict()) == [name] and not list(fixed.parameters())
    learnt = kind(nn.Parameter(values))
    assert [key for key, _ in learnt.named_parameters()] == [name]
    learnt(x).square().sum().backward()
    assert getattr(learnt, name).grad.shape == (3, 1)
    assert not torch.equal(learnt(x), fixed(x))
    twin = copy.deepcopy(learnt)
    twin.load_state_dict(fixed.state_dict())
    assert torch.equal(twin(x), fixed(x))
    with pytest.raises(ValueError, match="without gradient, got a tensor with gradient"):
        kind(nn.Parameter(values) * 1.0)


def test_a_learnt_alpha_can_leave_its_lower_bound_but_not_cross_it():
    layer = Entmax(1.0, learn_alpha=True)
    x = torch.randn(64, 11)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    seen = [layer.alpha.item()]
    for sign in (-1, 1, 1, 1, 1):  # the first step increases α; without a bound, the last would end below 1
        optimizer.zero_grad()
        (sign * layer(x).square().sum(-1).mean()).backward()
        optimizer.step()
        seen.append(layer.alpha.item())
    assert seen[0] == 1.0 and seen[1] > 1.0 and min(seen) == 1.0 == seen[-1]


def test_alpha_stays_in_float32():
    layer = Entmax(1.3, learn_alpha=True).bfloat16()
    assert layer.raw_alpha.dtype == torch.float32
    assert layer(torch.randn(3, 5).bfloat16()).dtype == torch.bfloat16


def test_repr_shows_the_values():
    assert repr(Entmax(torch.tensor([[1.25], [1.5]]), 1)) == "Entmax(alpha=[[1.25], [1.5]], dim=1)"
    learnt = Entmax(1.5, learn_alpha=True, alpha_range=(1.0, 3.0))
    assert repr(learnt) == "Entmax(alpha=1.5, learn_alpha=True, alpha_range=(1.0, 3.0), dim=-1)"


def test_invalid_input_raises_an_error():
    for alpha in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got"):
            Entmax(alpha)
    with pytest.raises(ValueError, match=r"alpha must be in alpha_range \[1, 2\], got 2.5"):
        Entmax(2.5, learn_alpha=True)
    with pytest.raises(ValueError, match=r"alpha_range must be \(low, high\)"):
        Entmax(1.5, alpha_range=(2, 1))
    with pytest.raises(TypeError, match="alpha must be a number or a floating tensor, got str"):
        Entmax("learned")
    with pytest.raises(ValueError, match=r"alpha must be in \(1, inf\), got 1"):
        Normmax(1)
    with pytest.raises(ValueError, match=r"budget must be in \(0, inf\), got 0"):
        BudgetSparsemax(0)
    with pytest.raises(ValueError, match=r"budget must be in \(0, 3\], got 4"):
        BudgetSparsemax(4)(torch.randn(3))
    for kind in (TopkSoftmax, SparseSoftmax):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            kind(0)
        with pytest.raises(ValueError, match="at most 3"):
            kind(4)(torch.randn(3))
