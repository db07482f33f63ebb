"""Which of torch's transforms is at work on us, and what it can bear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.fx import _symbolic_trace

from sparse_attn.versions import is_exporting


def is_traced() -> bool:
    """Whether torch writes the operations that we call into a graph: ``torch.jit.trace``, ``make_fx``, an export.

    A kernel that is called through a pointer leaves no operation behind: the graph would hold a constant, or memory
    that nothing has written to.
    """
    return torch._C._is_tracing() or _symbolic_trace._is_fx_tracing_flag or is_exporting()


def writes_onnx() -> bool:
    """Whether what is traced may become ONNX, which has fewer operations than torch."""
    return is_exporting() or (torch._C._is_tracing() and torch.onnx.is_in_onnx_export())


def values_known(*tensors: Tensor) -> bool:
    """Whether entries of tensors can be looked at: not in a trace, in ``torch.func`` or on the meta device."""
    if torch.compiler.is_compiling() or is_traced() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        # torch.autograd.grad makes batched tensors of gradients that it takes in batches.
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or is_legacy_batchedtensor(x):
            return False
    return True


def needs_plain_operations() -> bool:
    """Whether an autograd function or a custom operator would stop a transform, or make it silently wrong.

    True in a trace, whose graph should run without us; for ``torch.func`` inside a compiled function, which sees no
    forward mode in custom operators; for forward mode over forward mode, where an autograd function that saves its
    inputs loses the outer tangent; and in ``functionalize``, which has no rule for autograd functions.
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
    """What ``vmap`` batches along ``dim`` (None: not at all) as one more dimension of rows, before ``rank`` others.

    Rows are computed each on its own anyway; a tensor of fewer dimensions is aligned with the last of them.
    """
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(len(tensor), *[1] * (rank + 1 - tensor.dim()), *tensor.shape[1:])


def double_noticing_changes(value: Tensor) -> Tensor:
    """``value`` in float64, tied to the original: one that is changed in place before the backward is noticed there."""
    return value.pow(1).double()  # a power saves its base for the backward, a change of dtype does not
