"""The choice of the backend, automatic and forced."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_attn import backends, entmax, entmax_attention, sparsemax, topk_softmax, use_backend
from sparse_attn.kernels import choose_attention, dispatch
from sparse_attn.kernels.cpu import rows

compiled = pytest.mark.skipif(not rows.available(), reason="the kernels are not compiled here")


def test_every_backend_reports_how_it_runs_or_why_it_is_unavailable():
    state = backends()
    assert list(state) == ["triton", "compiled", "torch"] and all(state.values())
    assert state["compiled"].startswith("CPU tensors: " if rows.available() else "not available: ")


@compiled
def test_a_forced_backend_is_used(monkeypatch):
    calls = []
    forward = rows.entmax_forward
    monkeypatch.setattr(
        rows, "entmax_forward", lambda *args, **options: calls.append(args) or forward(*args, **options)
    )
    x = torch.randn(3, 5)
    with use_backend("torch"):
        assert backends()["compiled"] == "not used: another is forced"
        by_torch = sparsemax(x)
        with use_backend("compiled"):
            assert not calls
            by_kernel = sparsemax(x)
        assert len(calls) == 1
        sparsemax(x)
    assert len(calls) == 1
    torch.testing.assert_close(by_kernel, by_torch)
    sparsemax(x)
    assert len(calls) == 2  # outside the contexts, the C kernel is the default


@compiled
@pytest.mark.parametrize("k", [None, 4])
def test_backends_agree_with_gradients_included(k):
    alpha = torch.tensor([[1.0], [1.0001], [1.3], [1.5], [2.0], [3.0], [0.6]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(7, 131, dtype=dtype) * 2
        upstream = torch.randn_like(x)
        results = []
        for name in ("compiled", "torch"):
            scores, per_row = x.clone().requires_grad_(), alpha.clone().requires_grad_()
            with use_backend(name):
                p = entmax(scores, per_row) if k is None else topk_softmax(scores, k)
                inputs = (scores, per_row) if k is None else (scores,)
                results.append((p.detach(), *torch.autograd.grad(p, inputs, upstream)))
        for got, expected in zip(*results, strict=True):
            bound = 1e-6 if dtype == torch.float32 else 1e-11
            assert (got - expected).abs().max() <= bound * max(1, float(expected.abs().max()))


def by_rows(x: Tensor, alpha: Tensor) -> Tensor:
    return entmax(x, alpha)


def by_attention(x: Tensor, alpha: Tensor) -> Tensor:
    return entmax_attention(x, x, x, alpha.sum())


def by_blocks(x: Tensor, alpha: Tensor) -> Tensor:
    return entmax_attention(x, x, x, alpha.sum(), softcap=7.0)


def in_another_thread(backward: Callable[[], object]) -> None:
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


def in_the_context_of_another_backend(backward: Callable[[], object], other: str) -> None:
    with use_backend(other):
        backward()


@compiled
@pytest.mark.parametrize("twice", [False, True], ids=["first derivatives", "second derivatives"])
@pytest.mark.parametrize("operation", [by_rows, by_attention, by_blocks])
@pytest.mark.parametrize("name", ["compiled", "torch"])
def test_a_backward_uses_the_backend_of_its_forward(name, operation, twice, monkeypatch):
    """A backward can run outside the context of its forward: in a thread of autograd, or after the context ends."""
    monkeypatch.setattr(choose_attention, "_LARGE", 1)
    used = set()

    def note(backend: str, function: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments, **options: used.add(backend) or function(*arguments, **options)

    for backend, module in (("compiled", rows), ("torch", dispatch.plain_rows)):
        for function in ("entmax_forward", "entmax_backward"):
            monkeypatch.setattr(module, function, note(backend, getattr(module, function)))
    other = "torch" if name == "compiled" else "compiled"
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)

    def backward(output: Tensor) -> None:
        grads = torch.autograd.grad(output.sin().sum(), (x, alpha), create_graph=twice)
        if twice:
            torch.autograd.grad(sum(grad.cos().sum() for grad in grads), (x, alpha))

    with use_backend(name):
        first, second = operation(x, alpha), operation(x, alpha)
    in_another_thread(lambda: backward(first))
    in_the_context_of_another_backend(lambda: backward(second), other)
    assert used <= {name}
    # `used` has no entry for the attention kernel.
    assert used or (name, operation, twice) == ("compiled", by_attention, False)


def test_without_the_c_library_plain_torch_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    rows._load.cache_clear()
    try:
        assert backends()["compiled"].startswith("not available: no compiled library at")
        torch.testing.assert_close(sparsemax(torch.tensor([-2.0, 0.0, 0.5])), torch.tensor([0.0, 0.25, 0.75]))
        with pytest.raises(RuntimeError, match="backend 'compiled' is not available"), use_backend("compiled"):
            pass
    finally:
        monkeypatch.undo()
        rows._load.cache_clear()


def test_without_triton_plain_torch_is_used_after_one_warning(monkeypatch):
    monkeypatch.setattr(dispatch.triton, "status", lambda: (False, "Triton is not installed"))
    dispatch._warn_once.cache_clear()
    assert backends()["triton"] == "not available: Triton is not installed"
    with pytest.raises(RuntimeError, match="'triton' is not available: Triton is not installed"), use_backend("triton"):
        pass
    with pytest.warns(UserWarning, match="computed by plain torch, slowly: Triton is not installed") as seen:
        assert not dispatch._triton_computes("cuda") and not dispatch._triton_computes("cuda")
    assert len(seen) == 1


def test_unknown_backend_names_are_refused():
    with (
        pytest.raises(ValueError, match="name must be one of triton, compiled, torch, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
