"""The losses equal cross-entropy at α = 1 and their definition at every tested α; masks, dtypes and memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_attn import entmax
from sparse_attn.ops.losses import entmax15_loss, entmax_loss, sparsemax_loss

N, C, D1, D2 = 7, 5, 3, 2
SHAPES = [(C,), (N, C), (N, C, D1), (N, C, D1, D2)]
ALPHAS = [0.7, 1.0, 1.0001, 1.3, 1.5, 2.0, 2.7]
KINDS = ["indices", "probabilities"]


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])


def class_dim(x: Tensor) -> int:
    return min(x.dim() - 1, 1)


def target_for(kind: str, shape: tuple[int, ...], ignore_index: int = -100) -> Tensor:
    """A target of probabilities or of indices; a single index is not ignored, but some of several indices can be."""
    if kind == "probabilities":
        return torch.softmax(torch.randn(shape, dtype=torch.float64), min(len(shape) - 1, 1))
    target = torch.randint(C, rows_of(shape))
    return target if target.dim() == 0 else target.masked_fill(torch.rand(target.shape) < 0.2, ignore_index)


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


def assert_equal_losses(
    got: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor, **kw: Any
) -> None:
    """Compare values and gradients for every floating input."""
    ours, theirs = ([x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs] for _ in range(2))
    a, b = got(*ours), expected(*theirs)
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, equal_nan=True, **kw)
    learnt, same = ([x for x in some if x.requires_grad] for some in (ours, theirs))
    for x, y in zip(gradients(a, learnt), gradients(b, same), strict=True):
        torch.testing.assert_close(x, y, **kw)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_at_alpha_1_for_every_combination_of_arguments(shape, kind, reduction):
    ignored = [-100, -1] if kind == "probabilities" else [-100, 2, 99]
    weights = [None, torch.rand(C, dtype=torch.float64)]
    for weight, smoothing, ignore_index, scale in itertools.product(weights, [0.0, 0.1, 1.0], ignored, [1.0, 30.0]):
        x, target = scale * torch.randn(shape, dtype=torch.float64), target_for(kind, shape, ignore_index)
        keywords: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        if kind == "indices":
            keywords["ignore_index"] = ignore_index
        expected = partial(F.cross_entropy, **keywords)
        for alpha in (1.0, torch.ones((), dtype=torch.float64)):
            assert_equal_losses(
                lambda *args, alpha=alpha, keywords=keywords: entmax_loss(*args, alpha, **keywords),
                expected,
                x,
                target,
                rtol=1e-10,
                atol=1e-12,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_at_alpha_1_to_rounding_in_float32(kind):
    weight = torch.rand(1021)
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(11, 1021)
        target = torch.randint(1021, (11,)) if kind == "indices" else torch.softmax(torch.randn(11, 1021), 1)
        for keywords in ({}, {"weight": weight, "label_smoothing": 0.1}):
            assert_equal_losses(
                lambda *args, keywords=keywords: entmax_loss(*args, 1.0, **keywords),
                lambda *args, keywords=keywords: F.cross_entropy(*args, **keywords),
                x,
                target,
                rtol=1e-6,
                atol=1e-6,
            )


def conjugate_by_definition(x: Tensor, alpha: float, oracle: Callable[[Tensor, float], Tensor]) -> Tensor:
    """``⟨p, x⟩ + H(p)`` along the last dimension in float64; the oracle computes p."""
    p, x = oracle(x, alpha), x.double()
    entropy = -torch.xlogy(p, p).sum(-1) if alpha == 1 else (1 - (p**alpha).sum(-1)) / (alpha * (alpha - 1))
    return (p * x).sum(-1) + entropy


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.01, 1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_equal_their_definition(alpha, kind, shape, oracle):
    x, weight, smoothing = 2 * torch.randn(shape, dtype=torch.float64), torch.rand(C, dtype=torch.float64), 0.2
    target, dim = target_for(kind, shape), class_dim(x)
    one_hot = target.movedim(dim, -1) if kind == "probabilities" else F.one_hot(target.clamp(min=0), C).double()
    smoothed = one_hot * (1 - smoothing) + smoothing / C
    scores = x.movedim(dim, -1)
    each = conjugate_by_definition(scores, alpha, oracle).unsqueeze(-1) - scores
    per_row = (weight * smoothed * each).sum(-1)
    if kind == "indices":
        per_row = per_row.masked_fill(target == -100, 0.0)
    got = entmax_loss(x, target, alpha, weight=weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(got, per_row, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_random_distribution_exceeds_the_maximum_that_defines_the_loss(alpha):
    x, p = torch.randn(N, 1, C, dtype=torch.float64), torch.rand(1, 1009, C, dtype=torch.float64).pow(3)
    p = p / p.sum(-1, keepdim=True)
    entropy = -torch.xlogy(p, p).sum(-1) if alpha == 1 else (1 - (p**alpha).sum(-1)) / (alpha * (alpha - 1))
    attained = entmax_loss(x.squeeze(1), torch.zeros(N, dtype=torch.int64), alpha, reduction="none") + x[:, 0, 0]
    assert (attained.unsqueeze(1) >= (p * x).sum(-1) + entropy).all()


def test_named_losses_equal_the_general_loss():
    x, weight = torch.randn(N, C), torch.rand(C)
    keywords = {"weight": weight, "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.3}
    target = torch.randint(C, (N,))
    assert torch.equal(sparsemax_loss(x, target, **keywords), entmax_loss(x, target, 2.0, **keywords))
    assert torch.equal(entmax15_loss(x, target, **keywords), entmax_loss(x, target, 1.5, **keywords))
    assert torch.equal(entmax15_loss(x, target), entmax_loss(x, target))


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.01, 1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_relative_error_of_small_losses_in_float32(alpha, as_tensor):
    # At α = 3 the error of the mapping dominates.
    relative = 1e-4 if alpha <= 2 else 2e-3
    for size, scale in itertools.product([1, 2, 7, 1021], [0.01, 1.0, 10.0, 100.0, 1e4]):
        x = scale * torch.randn(17, size)
        target = x.argmax(-1)
        given = torch.tensor(alpha) if as_tensor else alpha
        exact = given.double() if as_tensor else alpha
        got = entmax_loss(x, target, given, reduction="none").double()
        expected = entmax_loss(x.double(), target, exact, reduction="none")
        error = (got - expected).abs()
        assert (error <= 5e-7 * expected.clamp(min=1)).all(), (size, scale)
        assert (error <= relative * expected + 1e-12).all(), (size, scale)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_losses_over_large_vocabularies(alpha, oracle):
    x, target = torch.randn(3, 32000) * torch.tensor([[0.01], [1.0], [10.0]]), torch.tensor([31999, 0, 17])
    expected = conjugate_by_definition(x, alpha, oracle) - x.double().gather(1, target.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(entmax_loss(x, target, alpha, reduction="none").double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_never_negative_and_zero_only_if_the_target_has_probability_one(alpha):
    x = torch.randn(4001, C) * torch.logspace(-2, 3, 4001).unsqueeze(1)
    # Rounded scores have ties. For some α, the target leads by exactly 1 / (α - 1), where the loss becomes 0.
    x[::3] = x[::3].round()
    for target in (x.argmax(1), torch.randint(C, (4001,))):
        loss = entmax_loss(x, target, alpha, reduction="none")
        of_target = entmax(x, alpha).gather(1, target.unsqueeze(1)).squeeze(1)
        assert (loss >= 0).all()
        assert (of_target[loss == 0] == 1).all()
        if alpha > 1:
            others = x.scatter(1, target.unsqueeze(1), -math.inf).amax(1)
            leads = x.gather(1, target.unsqueeze(1)).squeeze(1) - others >= 1 / (alpha - 1) + 1e-3
            assert (loss[leads] == 0).all() and (leads.any() or alpha < 1.01)
        for smoothing in (0.1, 1.0):
            assert (entmax_loss(x, target, alpha, reduction="none", label_smoothing=smoothing) >= 0).all()


def on_the_edge_of_the_support(alpha: float) -> Tensor:
    """Rows in which class 0 is the target, and most other scores are close to the edge of the support.

    Rounding could make some losses of such rows negative.
    """
    x = torch.zeros(4001, 7)
    x[:, 1:] = (torch.rand(4001, 6) * torch.logspace(-7, 0, 4001).unsqueeze(1) - 1) / (alpha - 1)
    return x


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0, 3.0])
def test_never_negative_on_the_edge_of_the_support(alpha):
    x, target = on_the_edge_of_the_support(alpha), torch.zeros(4001, dtype=torch.int64)
    for given in (alpha, torch.tensor(alpha)):
        assert (entmax_loss(x, target, given, reduction="none") >= 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_scores_far_from_zero(alpha):
    x, target = torch.randn(N, C).round(decimals=1), torch.randint(C, (N,))
    far = x + 2.0**17  # in float32, rounded by at most 2**-7
    expected = entmax_loss(far - 2.0**17, target, alpha, reduction="none")
    torch.testing.assert_close(entmax_loss(far, target, alpha, reduction="none"), expected)
    soft = torch.softmax(torch.randn(N, C), 1)
    expected = entmax_loss(far - 2.0**17, soft, alpha, label_smoothing=0.1)
    torch.testing.assert_close(entmax_loss(far, soft, alpha, label_smoothing=0.1), expected)


# -inf, ignored examples, missing classes


def same_as_cross_entropy(x: Tensor, target: Tensor, **keywords: Any) -> None:
    for reduction in ("none", "mean", "sum"):
        got, expected = (
            partial(f, reduction=reduction, **keywords)
            for f in (lambda x, target, **kw: entmax_loss(x, target, 1.0, **kw), F.cross_entropy)
        )
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.testing.assert_close(got(ours, target), expected(theirs, target), equal_nan=True)
        got(ours, target).sum().backward()
        expected(theirs, target).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_minus_infinity_and_ignored_examples_are_treated_as_in_cross_entropy(smoothing, weighted):
    keywords = {"label_smoothing": smoothing, "weight": torch.rand(C) if weighted else None}
    target = torch.tensor([0, 1, 2, -100, 3])
    x = torch.randn(5, C)
    same_as_cross_entropy(x, torch.full((5,), -100), **keywords)
    masked = x.clone()
    # -inf at another class than the target, at the target, and in an ignored example.
    masked[0, 4] = masked[1, 1] = masked[3, 0] = -torch.inf
    masked[2, [0, 1, 3, 4]] = -torch.inf  # only the target is visible
    same_as_cross_entropy(masked, target, **keywords)
    same_as_cross_entropy(masked, F.one_hot(target.clamp(min=0), C).float(), **keywords)
    lowest = x.clone()
    lowest[0, 1:] = lowest[1] = torch.finfo(torch.float32).min
    same_as_cross_entropy(lowest, target, **keywords)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_minus_infinity_is_masked_at_every_alpha(alpha):
    x = torch.randn(N, C, dtype=torch.float64)
    x[:, 3] = -torch.inf
    x.requires_grad_()
    target = torch.tensor([0, 1, 2, 4, 3, 0, 0])
    per_row = torch.full((N, 1), alpha, dtype=torch.float64, requires_grad=True)
    loss = entmax_loss(x, target, per_row, reduction="none")
    assert loss[4] == torch.inf and loss[target != 3].isfinite().all()
    grad_x, grad_alpha = torch.autograd.grad(loss.sum(), (x, per_row))
    torch.testing.assert_close(grad_x, entmax(x, alpha) - F.one_hot(target, C))
    assert grad_alpha.isfinite().all()
    without = entmax_loss(x[:, [0, 1, 2, 4]], target.clamp(max=3), per_row, reduction="none")
    torch.testing.assert_close(loss[target != 3], without[target != 3])


@pytest.mark.parametrize("alpha", [1.0, 1.3, 2.0])
def test_nan_and_infinity_affect_only_their_rows(alpha):
    x, target = torch.randn(N, C), torch.randint(C, (N,))
    expected = entmax_loss(x, target, alpha, reduction="none")
    x[2, 3], x[4, 0], x[5] = torch.nan, torch.inf, -torch.inf
    loss = entmax_loss(x, target, alpha, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, True, True, False]
    fine = ~loss.isnan()
    torch.testing.assert_close(loss[fine], expected[fine])


@pytest.mark.parametrize("shape", [(0, C), (N, C, 0), (0, C, D1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches(shape, kind, reduction):
    x = torch.randn(shape, requires_grad=True)
    target = torch.rand(shape) if kind == "probabilities" else torch.zeros(rows_of(shape), dtype=torch.int64)
    alpha = torch.tensor(1.5, requires_grad=True)
    loss = entmax_loss(x, target, alpha, reduction=reduction, label_smoothing=0.1)
    expected = F.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert x.grad.shape == shape and alpha.grad is not None


def test_zero_classes_with_only_ignored_targets_give_nan():
    loss = entmax_loss(torch.randn(3, 0), torch.full((3,), -100))
    assert loss.isnan() and F.cross_entropy(torch.randn(3, 0), torch.full((3,), -100)).isnan()


# dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_those_of_cross_entropy(dtype, autocast, kind):
    x, target = torch.randn(N, C).to(dtype).requires_grad_(), target_for(kind, (N, C))
    targets = [target] if kind == "indices" else [target.to(dtype), target.float()]
    for target, smoothing in itertools.product(targets, [0.0, 0.1]):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = entmax_loss(x, target, 1.5, label_smoothing=smoothing)
            assert loss.dtype == F.cross_entropy(x, target, label_smoothing=smoothing).dtype
        (grad_x,) = torch.autograd.grad(loss, x)
        assert grad_x.dtype == dtype
        wide = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        exact = entmax_loss(wide, target, 1.5, label_smoothing=smoothing)
        torch.testing.assert_close(loss, exact.to(loss.dtype))
        torch.testing.assert_close(grad_x, torch.autograd.grad(exact, wide)[0].to(dtype))


def test_weights_and_indices_of_other_dtypes():
    x, target, weight = torch.randn(N, C), torch.randint(C, (N,)), torch.rand(C)
    expected = entmax_loss(x, target, weight=weight)
    assert torch.equal(entmax_loss(x, target.to(torch.uint8), weight=weight), expected)
    wide = entmax_loss(x, target, weight=weight.double())
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, expected)
    soft = torch.softmax(torch.randn(N, C), 1)
    assert entmax_loss(x, soft, weight=weight.double()).dtype == torch.float64


def test_inputs_are_not_modified():
    x, soft, weight = torch.randn(N, C), target_for("probabilities", (N, C)), torch.rand(C)
    target = torch.randint(C, (N,))
    before = [t.clone() for t in (x, soft, weight, target)]
    x.requires_grad_()
    loss = entmax_loss(x, target, weight=weight, ignore_index=2, label_smoothing=0.1)
    (loss + entmax_loss(x, soft, weight=weight, label_smoothing=0.1)).backward()
    assert all(torch.equal(t, old) for t, old in zip((x, soft, weight, target), before, strict=True))


# memory


def peak_in_copies(x: Tensor, function: Callable[[], Tensor]) -> float:
    """Peak memory of forward and backward minus the memory before, as a multiple of the size of ``x``."""
    function().backward()  # allocates tensors that are created once and kept
    x.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function().backward()
    live = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top / (x.numel() * x.element_size())


@pytest.mark.parametrize(
    ("copies", "alpha", "keywords"),
    [
        (3, 1.0, {}),
        (6, 1.5, {}),
        (6, 1.5, {"label_smoothing": 0.1, "weight": torch.rand(32000)}),
        (6, 2.0, {"label_smoothing": 0.1}),
        (7, 1.25, {"weight": torch.rand(32000)}),
        (6, torch.tensor(1.25, requires_grad=True), {}),
    ],
)
def test_memory_for_a_vocabulary_is_a_few_copies_of_the_scores(copies, alpha, keywords):
    x, target = torch.randn(37, 32000, requires_grad=True), torch.randint(32000, (37,))
    assert peak_in_copies(x, lambda: entmax_loss(x, target, alpha, **keywords)) <= copies + 0.1
