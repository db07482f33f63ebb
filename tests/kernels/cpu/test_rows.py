"""Probabilities of the row kernels in C equal those of the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from c_rows import SIZES, exact, forward, needs_library

pytestmark = needs_library
ALPHAS = [0.5, 0.9, 1.0, 1.0001, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 1.99, 2.0, 2.5, 4.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_probabilities_equal_the_reference(alpha, variant):
    a = alpha - 1
    bound, double_bound = (4e-7 if alpha < 1 else 2e-7), 1e-13
    if alpha > 2:  # p = w^(1/a) is steep for w near 0, and w has the rounding error of a number near 1
        double_bound = 2 * torch.finfo(torch.float64).eps ** (1 / a)
        bound += double_bound
    for size, scale in itertools.product(SIZES, [0.01, 1.0, 10.0, 100.0]):
        x = torch.randn(3, size) * scale
        x[0] = x[0, 0]  # ties
        for given in (a, torch.full((3, 1), a)):
            p = forward(x, given, variant=variant)
            number = given if isinstance(given, float) else float(given[0])  # the tensor holds `a` in float32
            assert (p - exact(x, number)).abs().max() <= bound, (size, scale)
            assert (p.double().sum(-1) - 1).abs().max() <= 3e-7
        double = forward(x.double(), a, variant=variant)
        assert (double - exact(x, a)).abs().max() <= double_bound, (size, scale)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.001, 1.01, 1.25, 1.5, 1.9, 2.0])
def test_long_rows(alpha, variant):
    x = torch.randn(2, 32768) * torch.tensor([[0.01], [1.0]])
    p = forward(x, alpha - 1, variant=variant)
    assert (p - exact(x, alpha - 1)).abs().max() <= 2e-7
    assert (p.double().sum(-1) - 1).abs().max() <= 3e-7
    x = torch.randn(1, 2**17 + 3)
    assert (forward(x, alpha - 1, variant=variant) - exact(x, alpha - 1)).abs().max() <= 2e-7


@pytest.mark.parametrize("alpha", [1.05, 1.1, 1.3, 1.49, 1.5, 1.75, 2.0])
def test_rows_with_few_distinct_scores(alpha, variant):
    # Many scores are equal, so they leave the support together. Some are exactly 1 / (α - 1) below the largest score.
    counts = torch.tensor(list(itertools.product([1, 2], range(0, 120, 3), [0, 1, 5, 30, 60, 100])))
    top, second, _ = starts = counts.cumsum(-1).split(1, -1)
    place = torch.arange(255)
    for offset, step in itertools.product([0.0, 20.0], [1.0, 0.5 / (alpha - 1), 0.9]):
        x = -(step * sum((place >= start).float() for start in starts) - offset)  # a score of 0 is -0
        x = x.masked_fill(place >= second + 100, offset - 50.0).masked_fill(place < top, offset)
        expected = exact(x, alpha - 1)
        assert (forward(x, alpha - 1, variant=variant) - expected).abs().max() <= 3e-7, (offset, step)
        assert (forward(x.double(), alpha - 1, variant=variant) - expected).abs().max() <= 1e-12, (offset, step)


@pytest.mark.parametrize("alpha", [1.0625, 1.25, 1.5, 1.75, 2.0])
def test_a_score_of_minus_zero_on_the_edge_of_the_support(alpha, variant):
    x = torch.tensor([[1 / (alpha - 1), 0.8 / (alpha - 1), -0.0, -1.0]])
    for scores in (x, x.double()):
        p = forward(scores, alpha - 1, variant=variant)
        assert (p - exact(x, alpha - 1)).abs().max() <= 2e-7
        assert not (p == 0).logical_and(p.signbit()).any()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.75])
def test_entries_below_the_first_bound_have_no_weight(alpha):
    # The kernel leaves out entries below a bound, which it computes from a part of the row. With so many rows, the
    # test detects a bound that is too high in 1 of 2,500 rows.
    x = torch.randn(15_000, 512)
    expected = exact(x, alpha - 1)
    assert (forward(x, alpha - 1) - expected).abs().max() <= 2e-7
    assert (forward(x.double(), alpha - 1) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("alpha", [1.0001, 1.05, 1.2, 1.45])
def test_long_rows_whose_first_sample_differs_from_the_rest(alpha, variant):
    # In long rows, the kernels first read 16 of every 128 entries.
    seen = torch.arange(4099) % 128 < 16
    flat, x = torch.zeros(4099), torch.randn(4099)
    rows_of = [
        *(torch.where(seen, flat, flat - gap) for gap in (0.1, 3, 300)),
        *(torch.where(seen, flat - gap, flat) for gap in (0.1, 3, 300)),
        *(x.index_fill(0, torch.tensor([place]), 30.0) for place in (0, 77, 4098)),
        *(x.sort(descending=descending).values * scale for descending in (False, True) for scale in (1, 10)),
    ]
    x = torch.stack(rows_of)
    p, expected = forward(x, alpha - 1, variant=variant), exact(x, alpha - 1)
    assert (p - expected).abs().max() <= 2e-7
    assert (p.double().sum(-1) - 1).abs().max() <= 3e-7
    double = forward(x.double(), alpha - 1, variant=variant)
    assert (double - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.4, 1.45, 1.49, 1.5, 1.55, 1.75, 2.0])
def test_one_large_score_and_many_at_the_edge_of_the_support(alpha, variant):
    a = alpha - 1
    for size, spread in itertools.product((50, 900, 5000), (0, 1e-6, 1e-3, 1e-2)):
        x = torch.randn(19, size) * spread
        x[:, 7] += torch.linspace(0.9, 1, 19) / a
        assert (forward(x, a, variant=variant) - exact(x, a)).abs().max() <= 6e-7, (size, spread)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.3, 1.45])
def test_small_probabilities_keep_their_digits(alpha, variant):
    a = alpha - 1
    for size in (7, 64, 515, 4099):
        x = torch.randn(5, size)
        p, expected = forward(x, a, variant=variant), exact(x, a)
        # Here p = w^(1/a) with w = 1 + a (z - σ), where z is a score and σ a constant of the row. A rounding error e of
        # z causes a relative error e / w of p.
        w, shown = expected.pow(a), expected > 1e-30
        roundings = x.abs().amax() / w + expected.clamp(min=1e-30).log().abs() + 1
        error = (p - expected).abs() / expected
        assert (error <= 2 * torch.finfo(torch.float32).eps * roundings)[shown].all(), size
