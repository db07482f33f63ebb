"""Chooses the backend that computes rows and attention: a kernel if there is one for the tensor, else plain torch.

Modules outside the backends reach a backend through this module, and import no backend themselves.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from sparse_attn.kernels import triton
from sparse_attn.kernels.cpu import attention as native_attention
from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.plain import rows as plain_rows
from sparse_attn.kernels.triton.attention import plan
from sparse_attn.versions import constant_in_compiled_code

_NAMES = ("triton", "compiled", "torch")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def backends() -> dict[str, str]:
    """The backends in order of preference, each with a text that says how it runs, or why it is not available.

    Example:
        >>> list(backends())
        ['triton', 'compiled', 'torch']
    """
    forced = _forced.get()
    state = {name: why if available else f"not available: {why}" for name, (available, why) in _status().items()}
    return {name: state[name] if forced in (None, name) else "not used: another is forced" for name in _NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend only, in this thread, until the context ends.

    The gradients of an operation are computed by the backend that computed the operation, also after the context has
    ended and in the threads in which autograd computes on a GPU. This does not hold for ``torch.utils.checkpoint``,
    which calls the operation again during the backward.

    Args:
        name: A key of :func:`backends`. An operation for which the backend has no kernel is computed by torch.
            "triton" computes CPU tensors only in Triton's interpreter (``TRITON_INTERPRET=1``), and only under this
            function.

    Raises:
        ValueError: There is no backend called ``name``.
        RuntimeError: The backend is not available.

    Example:
        >>> import torch
        >>> from sparse_attn import sparsemax
        >>> with use_backend("torch"):
        ...     sparsemax(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])
    """
    if name not in _NAMES:
        raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {name!r}")
    available, why = _status()[name]
    if not available:
        raise RuntimeError(f"the backend {name!r} is not available: {why}")
    with backend_of_forward(name):
        yield


def forced_backend() -> str | None:
    """The backend that :func:`use_backend` has set here, or None: a forward keeps it for its backward."""
    return _forced.get()


@contextmanager
def backend_of_forward(name: str | None) -> Iterator[None]:
    """Compute a backward as its forward was computed; ``name`` is the result of :func:`forced_backend` there.

    A backward may run in a thread of autograd, or outside the context of the forward.
    """
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _status() -> dict[str, tuple[bool, str]]:
    compiled, why = rows.status()
    return {
        "triton": triton.status(),
        "compiled": (compiled, f"CPU tensors: {why}" if compiled else why),
        "torch": (True, "any dtype and device"),
    }


def entmax_forward(
    scores: Tensor, a: float | Tensor, lowest: float, k: int | None = None, *, in_place: bool = False
) -> Tensor:
    """:func:`kernels.reference.entmax.entmax_forward`, over the ``k`` largest scores of each row if ``k`` is given.

    A row of ``k`` scores or fewer keeps all of them. ``in_place`` allows the scores to be overwritten.
    """
    if k is not None and k >= scores.shape[-1]:
        k = None
    if by_triton(scores):
        with kernels_may_fail():
            return _triton_rows().entmax_forward(scores, a, lowest, k, in_place=in_place)
    if by_c(scores.device):
        return rows.entmax_forward(scores, a, lowest, k, in_place=in_place)
    if k is None:
        return plain_rows.entmax_forward(scores, a, lowest)
    return plain_rows.topk_entmax_forward(scores, k, a, lowest)


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, *, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same as :func:`kernels.reference.entmax.entmax_backward`, without being differentiable."""
    if by_triton(p):
        with kernels_may_fail():
            return _triton_rows().entmax_backward(p, a, grad, with_alpha)
    if by_c(p.device):
        return rows.entmax_backward(p, a, grad, with_alpha)
    return plain_rows.entmax_backward(p, a, grad, with_alpha=with_alpha)


def fused_kernels() -> ModuleType:
    """The module of fused attention, for tensors that :func:`by_triton` accepts. The first call imports Triton."""
    return importlib.import_module("sparse_attn.kernels.triton.attention.entry")


def native_kernels() -> ModuleType:
    """The module of attention in C, for tensors on a device that :func:`by_c` accepts."""
    return native_attention


def fused_plan() -> ModuleType:
    """The module with the sizes of the fused kernels and of the tensors kept for a backward; does not import Triton."""
    return plan


def by_triton(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether kernels in Triton compute with ``x``, or with ``x`` cast to ``dtype``.

    These kernels give NaN for an α out of range: a check would make the host wait for the device at every call.
    """
    return (x.dtype if dtype is None else dtype) in _TRITON_DTYPES and _triton_computes(x.device.type)


@constant_in_compiled_code
def _triton_computes(device: str) -> bool:
    """Whether kernels in Triton compute on a type of device. Compiled code keeps the answer from its compilation."""
    if device == "cpu":  # only in the interpreter, see use_backend
        return _forced.get() == "triton" and triton.interpreted()
    if device != "cuda" or _forced.get() not in (None, "triton"):
        return False
    available, why = triton.status()
    if not available:
        _warn_once(f"CUDA tensors are computed by plain torch, slowly: {why}")
    return available


@contextmanager
def kernels_may_fail() -> Iterator[None]:
    """If a Triton kernel in the block does not compile or start, the error becomes a warning.

    The code after the block then runs, and must compute the result without Triton. Later calls do not use Triton
    either. If the backend "triton" is forced, the error is raised.
    """
    try:
        yield
    except triton.KernelError as error:
        if _forced.get() == "triton":
            raise
        triton.give_up(str(error))
        _warn_once(f"CUDA tensors are computed by plain torch from now on, slowly: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _triton_rows() -> ModuleType:
    return importlib.import_module("sparse_attn.kernels.triton.rows")  # imports Triton


def by_c(device: torch.device) -> bool:
    """Whether kernels in C compute with tensors of a device."""
    return c_computes(device.type)


@constant_in_compiled_code
def c_computes(device: str) -> bool:
    """The same as :func:`by_c`, for the type of a device, such as "cpu"."""
    return device == "cpu" and _forced.get() in (None, "compiled") and rows.available()
