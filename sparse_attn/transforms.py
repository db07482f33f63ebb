"""Which of torch's transforms is at work on us, and what it can bear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from sparse_attn.versions import is_exporting


def values_known(*tensors: Tensor) -> bool:
    """Whether entries of tensors can be looked at: not while compiling, in ``torch.func`` or on the meta device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        # torch.autograd.grad makes batched tensors of gradients that it takes in batches.
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or is_legacy_batchedtensor(x):
            return False
    return True


def needs_plain_operations() -> bool:
    """Whether an autograd function or a custom operator would stop a transform, or make it silently wrong.

    True in an export, whose program should run without us; for ``torch.func`` inside a compiled function, which sees no
    forward mode in custom operators; and for forward mode over forward mode, where an autograd function that saves its
    inputs loses the outer tangent.
    """
    if is_exporting():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() == TransformType.Jvp for level in levels) > 1


def batch_in_front(tensor: Tensor, dim: int | None, size: int, rank: int) -> Tensor:
    """What ``vmap`` batches along ``dim`` (None: not at all) as one more dimension of rows, before ``rank`` others.

    Rows are computed each on its own anyway; a tensor of fewer dimensions is aligned with the last of them.
    """
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(len(tensor), *[1] * (rank + 1 - tensor.dim()), *tensor.shape[1:])


def double_noticing_changes(value: Tensor) -> Tensor:
    """``value`` in float64, tied to the original: one that is changed in place before the backward is noticed there."""
    return value.pow(1).double()  # a power saves its base for the backward, a change of dtype does not
