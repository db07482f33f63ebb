"""Transforms of torch (compile, export, ``torch.func``, fx): whether one is active, and helpers for code in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.fx import Proxy

from sparse_attn.versions import fx_traces, is_exporting

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def leaf(forward: _Forward) -> _Forward:
    """Decorate a ``forward`` that ``torch.fx.symbolic_trace`` should record as one call, without tracing into it.

    The tracer does this for the modules in ``torch.nn``, but not for drop-ins of another package.
    """

    @functools.wraps(forward)
    def recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Proxy):
                tracer: Any = x.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
        return forward(module, *args, **kwargs)

    return cast(_Forward, recorded)


def is_traced() -> bool:
    """Whether torch records operations in a graph: in ``torch.jit.trace``, ``torch.fx``, ``make_fx`` or an export.

    A kernel that is called through a pointer is not recorded: the graph would contain a constant, or uninitialised
    memory.
    """
    return torch._C._is_tracing() or fx_traces() or is_exporting()


def writes_onnx() -> bool:
    """Whether the graph of a trace can become ONNX, which has fewer operations than torch."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the call below
        return is_exporting()
    return torch._C._is_tracing() and torch.onnx.is_in_onnx_export()


def values_known(*tensors: Tensor) -> bool:
    """Whether entries of tensors can be read.

    False under ``torch.compile``, in a trace or ``torch.func``, for tensors on the meta device, for tensors that torch
    batches, and for subclasses other than ``nn.Parameter``.
    """
    if torch.compiler.is_compiling() or is_traced() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        # torch.autograd.grad with is_grads_batched=True passes batched tensors.
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or is_legacy_batchedtensor(x):
            return False
    return True


def readable(x: Tensor) -> Tensor | None:
    """``x`` or, in ``torch.func``, the tensor that ``x`` wraps; None if a check cannot read the entries."""
    if torch.compiler.is_compiling() or is_traced():
        return None
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    known = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not is_legacy_batchedtensor(x)
    return x if known else None


def needs_plain_operations() -> bool:
    """Whether to call only torch's own operations, neither autograd functions nor custom operators of this library.

    True in four cases:

    - in a trace or an export, whose graph should run without this library;
    - in ``torch.func`` inside a compiled function, where custom operators have no forward mode;
    - in forward mode over forward mode, where an autograd function that saves its inputs loses the outer tangent;
    - in ``functionalize``, which has no rule for autograd functions and custom operators.
    """
    if is_exporting():
        return True
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    if is_traced():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    return levels.count(TransformType.Jvp) > 1 or TransformType.Functionalize in levels


def batch_in_front(tensor: Tensor, dim: int | None, size: int, rank: int) -> Tensor:
    """A tensor that ``vmap`` batches along ``dim`` (None: not batched), with the batch as its first dimension.

    The kernels compute each row independently, so the batch is one more dimension of rows. The result has
    ``rank + 1`` dimensions: if the tensor has fewer, dimensions of size 1 are inserted after the batch.
    """
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(len(tensor), *[1] * (rank + 1 - tensor.dim()), *tensor.shape[1:])


def double_noticing_changes(value: Tensor) -> Tensor:
    """``value`` in float64; the backward raises an error if ``value`` was changed in place after this call."""
    return value.pow(1).double()  # pow saves its base for the backward, so autograd detects the change; double does not
