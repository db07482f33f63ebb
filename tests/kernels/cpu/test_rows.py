from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.reference import entmax as reference

available, why = rows.status()
pytestmark = pytest.mark.skipif(not available, reason=why)

SIZES = [1, 2, 7, 31, 127, 128, 129, 257, 1021, 4099]
ALPHAS = [0.5, 0.9, 1.0, 1.0001, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 1.99, 2.0, 2.5, 4.0]
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(params=rows.variants() or ["none"])
def variant(request) -> str:
    return request.param


def forward(x: Tensor, a: float | Tensor, lowest: float = LOWEST, variant: str | None = None) -> Tensor:
    return rows.entmax_forward(x, a, lowest, variant=variant)


def exact(x: Tensor, a: float | Tensor, lowest: float = LOWEST) -> Tensor:
    return reference.entmax_forward(x.double(), a.double() if isinstance(a, Tensor) else a, lowest)


def exact_gradients(p: Tensor, a: float | Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = a.double() if isinstance(a, Tensor) else a
    grad_scores, grad_a = reference.entmax_backward(p.double(), wide, grad.double(), with_alpha=True)
    assert grad_a is not None
    return grad_scores, grad_a


def naive_topk(x: Tensor, k: int, a: float, lowest: float = LOWEST) -> Tensor:
    index = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]
    kept = exact(x.gather(-1, index), a, lowest)
    return torch.zeros_like(x, dtype=torch.float64).scatter(-1, index, kept)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_probabilities_are_those_of_the_reference(alpha, variant):
    a = alpha - 1
    bound, double_bound = (4e-7 if alpha < 1 else 2e-7), 1e-13
    if alpha > 2:  # where an entry enters the support, p = w^(1/a) of a w that is right to the last bit of 1
        double_bound = 2 * torch.finfo(torch.float64).eps ** (1 / a)
        bound += double_bound
    for size, scale in itertools.product(SIZES, [0.01, 1.0, 10.0, 100.0]):
        x = torch.randn(3, size) * scale
        x[0] = x[0, 0]  # ties
        for given in (a, torch.full((3, 1), a)):
            p = forward(x, given, variant=variant)
            number = given if isinstance(given, float) else float(given[0])  # rounded to float32 by the tensor
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
def test_rows_of_few_levels(alpha, variant):
    # Many entries leave the support at once, some of them at 1 / (α - 1) below the largest to the last bit.
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
def test_what_is_left_out_of_a_row_has_no_weight(alpha):
    # A bound from a part of the row decides; one that is too high in one row of 2,500 shows here.
    x = torch.randn(15_000, 512)
    expected = exact(x, alpha - 1)
    assert (forward(x, alpha - 1) - expected).abs().max() <= 2e-7
    assert (forward(x.double(), alpha - 1) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("alpha", [1.0001, 1.05, 1.2, 1.45])
def test_long_rows_of_which_a_part_tells_nothing_of_the_rest(alpha, variant):
    # The kernels look at 16 entries in 128 first.
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
def test_one_score_above_many_at_the_edge_of_the_support(alpha, variant):
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
        # A rounding of a score moves p = w^(1/a), w = 1 + a (z - σ), by 1 / w, and one of its logarithm by that.
        w, shown = expected.pow(a), expected > 1e-30
        roundings = x.abs().amax() / w + expected.clamp(min=1e-30).log().abs() + 1
        error = (p - expected).abs() / expected
        assert (error <= 2 * torch.finfo(torch.float32).eps * roundings)[shown].all(), size


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_those_of_the_reference(alpha, variant):
    a = alpha - 1
    for size, scale in itertools.product(SIZES, [0.1, 3.0]):
        x, grad = torch.randn(3, size) * scale, torch.randn(3, size) + 5
        for dtype, bound, bound_a in ((torch.float32, 3e-6, 3e-5), (torch.float64, 1e-12, 1e-11)):
            p = forward(x.to(dtype), a, variant=variant)
            upstream = grad.to(dtype)
            grad_scores, grad_a = rows.entmax_backward(p, a, upstream, True, variant=variant)
            alone, none = rows.entmax_backward(p, a, upstream, variant=variant)
            expected, expected_a = exact_gradients(p, a, upstream)
            assert grad_a is not None and none is None
            assert grad_scores.dtype == grad_a.dtype == dtype
            bound *= 1 + float(expected.abs().max())
            assert (grad_scores - expected).abs().max() <= bound, (size, scale, dtype)
            assert (alone - expected).abs().max() <= bound, (size, scale, dtype)
            assert (grad_a - expected_a).abs().max() <= bound_a * (1 + expected_a.abs().max()), (size, scale, dtype)


@pytest.mark.parametrize("alpha", [0.9, 1.0, 1.0001, 1.3, 1.5, 1.9])
def test_gradients_of_nearly_one_hot_rows_keep_their_digits(alpha, variant):
    a = alpha - 1
    rest = torch.logspace(-9, -2, 43)[:, None]  # what the largest entry leaves to the others
    p = torch.cat([1 - rest, rest * torch.tensor([0.5, 0.3, 0.2])], -1).repeat(3, 1)
    grad = torch.randn(len(p), 4)
    expected, expected_a = exact_gradients(p, a, grad)
    for size in (4, 4096):  # packed, and as it is
        wide, wide_grad = (torch.nn.functional.pad(x, (0, size - 4)) for x in (p, grad))
        for with_alpha in (False, True):
            grad_scores, grad_a = rows.entmax_backward(wide, a, wide_grad, with_alpha, variant=variant)
            error = (grad_scores[:, :4] - expected).abs().amax(-1) / expected.abs().amax(-1)
            assert error.max() <= 5e-6, (size, with_alpha)
            if grad_a is not None:
                assert ((grad_a - expected_a).abs() / expected_a.abs()).max() <= 5e-6, size


def test_every_row_goes_by_its_own_alpha(variant):
    alpha = torch.tensor([1.0, 1.5, 2.0, 1.2, 0.7, 3.0, 1.0 + 1e-7, 1.9])
    x, grad = torch.randn(3, 8, 5, 67), torch.randn(3, 8, 5, 67)
    a = (alpha - 1).view(8, 1, 1)
    p = forward(x, a, variant=variant)
    grad_scores, grad_a = rows.entmax_backward(p, a, grad, True, variant=variant)
    for head, number in enumerate((alpha - 1).tolist()):
        assert (p[:, head] - exact(x[:, head], number)).abs().max() <= 4e-7
    expected, expected_a = exact_gradients(p, a, grad)
    assert grad_a is not None and grad_a.shape == (3, 8, 5, 1)
    assert (grad_scores - expected).abs().max() <= 2e-6
    assert (grad_a - expected_a).abs().max() <= 2e-6
    expanded = a.expand(3, 8, 5, 1)
    for same in (expanded, expanded.contiguous(), a.double()):
        torch.testing.assert_close(forward(x, same, variant=variant), p, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_half_precision_is_the_float32_result_rounded_once(dtype, alpha, variant):
    a, lowest = alpha - 1, torch.finfo(dtype).min
    for size in (1, 7, 128, 1021):
        x = (torch.randn(4, size) * 3).to(dtype)
        x[1, ::2] = lowest
        x[2] = -math.inf
        p = forward(x, a, lowest, variant)
        assert torch.equal(p, forward(x.float(), a, lowest, variant).to(dtype))
        grad = torch.randn(4, size).to(dtype) * 1000
        grad_scores, grad_a = rows.entmax_backward(p, a, grad, True, variant=variant)
        wide, wide_a = rows.entmax_backward(p.float(), a, grad.float(), True, variant=variant)
        assert grad_a is not None and wide_a is not None
        assert torch.equal(grad_scores, wide.to(dtype))
        assert grad_a.dtype == torch.float32 and torch.equal(grad_a, wide_a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_converted(dtype, variant):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    # At α = 2 and p = (1/2, 1/2) the gradient is (g - g') / 2: both conversions, and no other rounding.
    grad = torch.stack([every, torch.zeros_like(every)], -1)
    half = torch.full_like(grad, 0.5)
    grad_scores, _ = rows.entmax_backward(half, 1.0, grad, variant=variant)
    assert torch.equal(grad_scores[:, 0], (every.float() / 2).to(dtype))
    overflow = torch.tensor([[math.inf, math.nan]], dtype=dtype)
    assert rows.entmax_backward(half[:1], 1.0, overflow, variant=variant)[0].isnan().all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_strides(alpha, variant):
    a = alpha - 1
    base = torch.randn(7, 34, 5, 11)
    views = [
        base.transpose(1, 3),  # a strided last dimension
        base.permute(3, 0, 2, 1),
        base[:, 3:20, :, 1:8],  # contiguous rows with gaps
        base[::2, :, ::3, ::2],
        base[:, :1].expand(7, 34, 5, 11),
        base[..., :1].expand(7, 34, 5, 11),  # stride 0 in the last dimension
        base[0, 0, 0],  # one row
        torch.randn(3, 1, 2, 1, 5, 1, 2, 19).transpose(0, -1),
    ]
    for x in views:
        p = forward(x, a, variant=variant)
        assert p.shape == x.shape and p.is_contiguous()
        assert torch.equal(p, forward(x.contiguous(), a, variant=variant))
        strided = torch.randn_like(p)[..., :1].expand_as(p)
        for grad in (
            strided,
            torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1)),
            torch.ones(()).expand_as(p),
        ):
            got, got_a = rows.entmax_backward(p, a, grad, True, variant=variant)
            same, same_a = rows.entmax_backward(p, a, grad.contiguous(), True, variant=variant)
            assert torch.equal(got, same)
            assert got_a is not None and same_a is not None and torch.equal(got_a, same_a)
        strided_p = p.transpose(0, -1).contiguous().transpose(0, -1)
        got, _ = rows.entmax_backward(strided_p, a, grad, variant=variant)
        assert torch.equal(got, rows.entmax_backward(p, a, grad, variant=variant)[0])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.001, 1.5, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("size", [3, 129, 300])
def test_masked_entries_and_rows(alpha, size, variant):
    a = alpha - 1
    x = torch.randn(6, size)
    x[0] = -math.inf
    x[1] = LOWEST
    x[2, 1:] = -math.inf
    x[3, ::2] = LOWEST
    x[4, : size // 2] = -math.inf
    p = forward(x, a, variant=variant)
    assert (p - exact(x, a)).abs().max() <= 4e-7
    assert not p[:2].any() and p[2, 0] == 1 and not p[3, ::2].any()
    for with_alpha in (False, True):
        grad_scores, grad_a = rows.entmax_backward(p, a, torch.randn(6, size), with_alpha, variant=variant)
        assert not grad_scores[:2].any() and not grad_scores[3, ::2].any() and grad_scores.isfinite().all()
        assert grad_a is None or (not grad_a[:2].any() and grad_a.isfinite().all())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_nan_and_infinity(alpha, size, variant):
    a = alpha - 1
    x = torch.randn(6, size)
    x[0, -1] = math.nan
    x[1] = -math.inf
    x[1, size // 2] = math.nan
    x[2, 0] = math.inf
    x[3, -1] = -1e30
    x[3, 0] = 3e38
    for dtype in (torch.float32, torch.float64):
        p = forward(x.to(dtype), a, variant=variant)
        torch.testing.assert_close(p.double(), exact(x, a), equal_nan=True, rtol=0, atol=4e-7)
        assert p[:3].isnan().all() and not p[3:].isnan().any()
        grad_scores, grad_a = rows.entmax_backward(p, a, torch.randn_like(p), True, variant=variant)
        assert grad_a is not None
        assert grad_scores[:3].isnan().all() and grad_a[:3].isnan().all()
        assert not grad_scores[3:].isnan().any() and not grad_a[3:].isnan().any()
        assert rows.entmax_backward(p, a, torch.randn_like(p), variant=variant)[0][:3].isnan().all()


def test_gradients_outside_the_support_are_not_looked_at(variant):
    for a, with_alpha, size in itertools.product([0.0, 0.3, 0.5, 1.0], [False, True], [16, 17]):
        p = torch.zeros(1, size)
        p[0, :2] = 0.5
        grad = torch.full((1, size), math.nan)
        grad[0, :2] = torch.tensor([1.0, 2.0])
        grad_scores, _ = rows.entmax_backward(p, a, grad, with_alpha, variant=variant)
        torch.testing.assert_close(grad_scores[0, 0], -grad_scores[0, 1])
        assert grad_scores[0, 0] < 0 and not grad_scores[0, 2:].any()


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 0.3, 2.0])
def test_largest(a, variant):
    for size, dtype in itertools.product(SIZES, [torch.float32, torch.float64]):
        x = torch.randn(4, size, dtype=dtype)
        x[1] = x[1].round()  # ties
        x[2] = 0.0
        x[3, ::3] = -math.inf
        for k in {1, 2, 5, 32, 127, size // 2, size - 1, size} - {0}:
            if k > size:
                continue
            p = rows.entmax_forward(x, a, LOWEST, k, variant=variant)
            expected = naive_topk(x, k, a)
            assert torch.equal(p > 0, expected > 0) or a not in (0.0, 1.0), (size, k)
            assert (p - expected).abs().max() <= 2e-7, (size, k)
            assert int((p > 0).sum(-1).max()) <= k


def test_ties_at_the_cut_go_to_the_lowest_index(variant):
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])):
        p = rows.entmax_forward(x, 0.0, LOWEST, k, variant=variant)
        assert p[0].nonzero().flatten().tolist() == kept
    zeros = torch.randn(2, 1021).relu()
    p = rows.entmax_forward(zeros, 0.0, LOWEST, 700, variant=variant)
    assert torch.equal(p > 0, naive_topk(zeros, 700, 0.0) > 0)
    alpha = torch.tensor([[0.0], [1.0]])
    p = rows.entmax_forward(zeros, alpha, LOWEST, 3, variant=variant)
    assert (p - torch.cat([naive_topk(zeros[:1], 3, 0.0), naive_topk(zeros[1:], 3, 1.0)])).abs().max() <= 2e-7
    nan = torch.tensor([[1.0, math.nan, 3.0], [-math.inf, -math.inf, -math.inf], [0.0, math.inf, 1.0]])
    p = rows.entmax_forward(nan, 0.5, LOWEST, 2, variant=variant)
    assert p[0].isnan().all() and not p[1].any() and p[2].isnan().all()


def test_empty_tensors(variant):
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
        x = torch.empty(shape)
        for a in (0.5, torch.full((1,), 0.5)):
            assert forward(x, a, variant=variant).shape == shape
            grad_scores, grad_a = rows.entmax_backward(x, a, x, True, variant=variant)
            assert grad_scores.shape == shape and grad_a is not None
            assert grad_a.shape == (*shape[:-1], 1) and not grad_a.any()


def test_threads_change_nothing():
    x, grad = torch.randn(37, 8, 1021), torch.randn(37, 8, 1021)
    a = torch.linspace(0, 1, 8).view(8, 1)
    alone = forward(x, a), *rows.entmax_backward(forward(x, a), a, grad, True)
    try:
        torch.set_num_threads(3)
        assert "3 threads" in rows.status()[1]
        together = forward(x, a), *rows.entmax_backward(forward(x, a), a, grad, True)
        with ThreadPoolExecutor(4) as pool:  # ctypes lets go of the interpreter's lock
            others = list(pool.map(lambda _: forward(x, a), range(8)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert all(torch.equal(other, alone[0]) for other in others)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_after_a_call_with_threads():
    script = """
        import os, torch
        from sparse_attn.kernels.cpu import rows
        torch.set_num_threads(2)
        x = torch.randn(512, 512)
        p = rows.entmax_forward(x, 0.5, -3e38)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rows.entmax_forward(x, 0.5, -3e38), p) else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=120)


def test_variants_and_status():
    names = rows.variants()
    assert names[0] == "baseline" and rows.status() == (True, f"{names[-1]}, 1 thread")
    with pytest.raises(KeyError):
        forward(torch.randn(3), 1.0, variant="mmx")


def test_memory_that_runs_out_is_an_error(monkeypatch):
    out_of_memory = rows.library()._replace(forward=lambda *_: 1, backward=lambda *_: 1)
    monkeypatch.setattr(rows, "_load", lambda: out_of_memory)
    with pytest.raises(MemoryError):
        forward(torch.randn(3), 1.0)
    with pytest.raises(MemoryError):
        rows.entmax_backward(torch.ones(1), 1.0, torch.ones(1))


def test_a_missing_or_broken_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    assert "no compiled library" in rows._load.__wrapped__()
    (tmp_path / rows.LIBRARY).write_bytes(b"not a library")
    assert "cannot be loaded" in rows._load.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(rows, "_INTERFACE", -1)
    assert "another version" in rows._load.__wrapped__()
    monkeypatch.setattr(rows, "_load", lambda: "there is none")
    assert rows.status() == (False, "there is none") and rows.variants() == []
    with pytest.raises(RuntimeError, match="there is none"):
        forward(torch.randn(3), 1.0)
