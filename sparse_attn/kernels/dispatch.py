"""The one place that chooses who computes a mapping: the compiled kernels where there are any, else plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from sparse_attn.kernels import torch_rows
from sparse_attn.kernels.cpu import products as sparse_products
from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.reference import products as dense_products

_NAMES = ("compiled", "torch")
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def backends() -> dict[str, str]:
    """What there is to compute with, in the order in which it is chosen, and how it runs or why it cannot.

    Example:
        >>> list(backends())
        ['compiled', 'torch']
    """
    available, why = rows.status()
    forced = _forced.get()
    state = {
        "compiled": f"CPU tensors: {why}" if available else f"not available: {why}",
        "torch": "any dtype and device",
    }
    return {name: state[name] if forced in (None, name) else "not used: another is forced" for name in _NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend alone while the context lasts, in this thread.

    Args:
        name: A key of :func:`backends`. What "compiled" has no kernel for is still computed by torch.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It is not available.

    Example:
        >>> import torch
        >>> from sparse_attn import sparsemax
        >>> with use_backend("torch"):
        ...     sparsemax(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])
    """
    if name not in _NAMES:
        raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {name!r}")
    available, why = rows.status()
    if name == "compiled" and not available:
        raise RuntimeError(f"the backend 'compiled' is not available: {why}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def entmax_forward(
    scores: Tensor, a: float | Tensor, lowest: float, k: int | None = None, *, in_place: bool = False
) -> Tensor:
    """As :func:`kernels.reference.entmax.entmax_forward`, of the ``k`` largest scores of each row if ``k`` is given.

    ``in_place`` allows the scores to be overwritten.
    """
    if _compiled(scores):
        return rows.entmax_forward(scores, a, lowest, k, in_place=in_place)
    if k is None:
        return torch_rows.entmax_forward(scores, a, lowest)
    return torch_rows.topk_entmax_forward(scores, k, a, lowest)


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, *, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As :func:`kernels.reference.entmax.entmax_backward`, but not differentiable."""
    if _compiled(p):
        return rows.entmax_backward(p, a, grad, with_alpha)
    return torch_rows.entmax_backward(p, a, grad, with_alpha=with_alpha)


def products(p: Tensor, *others: Tensor) -> ModuleType:
    """Who multiplies weights ``p`` with these matrices: :mod:`reference.products`, or what skips the zeros."""
    return sparse_products if _compiled(p) and sparse_products.worth_it(p, *others) else dense_products


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and _forced.get() != "torch" and rows.available()
