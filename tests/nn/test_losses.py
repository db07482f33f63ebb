"""The losses as modules: drop-ins for ``nn.CrossEntropyLoss``; ``EntmaxLoss`` also holds α."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn.nn.losses import Entmax15Loss, EntmaxLoss, SparsemaxLoss
from sparse_attn.ops.losses import entmax15_loss, entmax_loss, sparsemax_loss

# Warnings of torch itself, at the first compilation in a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

N, C = 7, 5
KEYWORDS = {"ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, C), torch.arange(N) % C


@pytest.mark.parametrize(
    ("cls", "function"),
    [(SparsemaxLoss, sparsemax_loss), (Entmax15Loss, entmax15_loss), (EntmaxLoss, entmax_loss)],
)
def test_a_module_passes_its_arguments_to_its_function(cls, function):
    x, target = batch()
    weight = torch.rand(C)
    assert torch.equal(cls()(x, target), function(x, target))
    expected = function(x, target, weight=weight, **KEYWORDS)
    assert torch.equal(cls(weight=weight, **KEYWORDS)(x, target), expected)
    assert not torch.equal(expected, function(x, target))


def test_positional_arguments_equal_keywords_and_alpha_one_equals_cross_entropy():
    x, target = batch()
    weight = torch.rand(C)
    for cls, function in ((SparsemaxLoss, sparsemax_loss), (Entmax15Loss, entmax15_loss)):
        assert torch.equal(cls(weight, *KEYWORDS.values())(x, target), function(x, target, weight=weight, **KEYWORDS))
    ours = EntmaxLoss(1.0, weight, *KEYWORDS.values())
    theirs = nn.CrossEntropyLoss(weight, **KEYWORDS)
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert not EntmaxLoss().state_dict()


def test_alpha_is_a_number_a_buffer_or_learnt():
    x, target = batch()
    given = torch.linspace(1.1, 1.9, N).view(N, 1)
    for alpha, learn, parameters, buffers in (
        (1.3, False, [], []),
        (1.3, True, ["raw_alpha"], []),
        (given, False, [], ["raw_alpha"]),
        (given, True, ["raw_alpha"], []),
        (nn.Parameter(given), False, ["raw_alpha"], []),
    ):
        loss = EntmaxLoss(alpha, learn_alpha=learn)
        assert [name for name, _ in loss.named_parameters()] == parameters
        assert [name for name, _ in loss.named_buffers() if name != "weight"] == buffers
        torch.testing.assert_close(loss(x, target), entmax_loss(x, target, alpha))


def test_trained_by_the_loss_alone_alpha_reaches_its_upper_bound():
    x, target = batch()
    loss = EntmaxLoss(1.5, learn_alpha=True, alpha_range=(1.25, 1.75))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(11):
        optimizer.zero_grad()
        loss(x, target).backward()
        optimizer.step()
    assert loss.alpha.item() == 1.75
    loss(x, target).backward()
    assert loss.raw_alpha.grad.isfinite()


@pytest.mark.parametrize("cls", [SparsemaxLoss, Entmax15Loss, EntmaxLoss])
def test_copies_pickles_and_moves_keep_the_loss(cls):
    x, target = batch()
    loss = cls(weight=torch.rand(C), **KEYWORDS)
    expected = loss(x, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, target), expected)
        assert twin.weight is not loss.weight
    assert loss.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert loss.to("meta").weight.is_meta


def test_a_learnt_alpha_survives_copies_and_half_precision():
    x, target = batch()
    loss = EntmaxLoss(1.3, torch.rand(C), learn_alpha=True)
    expected = loss(x, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, target), expected) and twin.raw_alpha is not loss.raw_alpha
    loss.half()
    assert loss.raw_alpha.dtype == torch.float32 and loss.weight.dtype == torch.float16
    half = loss(x.half(), target)
    half.backward()
    assert half.dtype == torch.float16 and loss.raw_alpha.grad is not None


def test_repr_is_the_constructor_call_without_the_weight():
    assert repr(SparsemaxLoss(torch.ones(C))) == (
        "SparsemaxLoss(ignore_index=-100, reduction='mean', label_smoothing=0.0)"
    )
    assert repr(Entmax15Loss(**KEYWORDS)) == "Entmax15Loss(ignore_index=2, reduction='sum', label_smoothing=0.1)"
    assert repr(EntmaxLoss(1.3)) == "EntmaxLoss(alpha=1.3, ignore_index=-100, reduction='mean', label_smoothing=0.0)"
    assert repr(EntmaxLoss(1.5, learn_alpha=True)) == (
        "EntmaxLoss(alpha=1.5, learn_alpha=True, alpha_range=(1.0, 2.0), ignore_index=-100, reduction='mean', "
        "label_smoothing=0.0)"
    )


def test_changes_of_alpha_and_of_the_batch_size_cause_no_recompilation():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss = EntmaxLoss(1.5, torch.rand(C), learn_alpha=True, alpha_range=(1.0, 4.0))
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    alphas, counts = set(), set()
    for rows in (3, 5, 11):
        x, target = torch.randn(rows, C, requires_grad=True), torch.arange(rows) % C
        got, expected = compiled(x, target), loss(x, target)
        torch.testing.assert_close(got, expected)
        inputs = (x, loss.raw_alpha)
        for a, b in zip(*(torch.autograd.grad(value, inputs) for value in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
        optimizer.zero_grad()
        compiled(x, target).backward()
        optimizer.step()
        alphas.add(loss.alpha.item())
        counts.add(counter.frame_count)
    assert len(alphas) == 3 and len(counts) == 1


@pytest.mark.parametrize("cls", [SparsemaxLoss, Entmax15Loss, EntmaxLoss])
@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (TypeError, "weight must be a torch.Tensor, got list", {"weight": [1.0]}),
        (TypeError, "weight must have a floating dtype", {"weight": torch.ones(C, dtype=torch.int64)}),
        (ValueError, r"weight must have shape \(C\), got shape \(\)", {"weight": torch.ones(())}),
        (TypeError, "ignore_index must be an int, got NoneType", {"ignore_index": None}),
        (ValueError, "reduction must be one of none, mean, sum, got None", {"reduction": None}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 2", {"label_smoothing": 2}),
    ],
)
def test_invalid_arguments_are_refused_by_the_constructor(cls, error, message, keywords):
    with pytest.raises(error, match=message):
        cls(**keywords)


def test_alpha_outside_its_range_or_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got -1"):
        EntmaxLoss(-1.0)
    with pytest.raises(ValueError, match=r"alpha must be in alpha_range \[1, 2\], got 3"):
        EntmaxLoss(3.0, learn_alpha=True)
    x, target = batch()
    with pytest.raises(ValueError, match=r"use alpha.view\(-1, 1\)"):
        EntmaxLoss(torch.full((N,), 1.5))(x, target)
