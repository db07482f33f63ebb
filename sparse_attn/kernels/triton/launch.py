"""Starts a kernel on the device of its tensors, with the compiler options that the kernels rely on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.triton import KernelError, interpreted


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> Any:
    """Start ``programs`` programs of a kernel, on the device of the first tensor among the arguments.

    Returns:
        The compiled kernel, as Triton returns it; None in the interpreter.

    Raises:
        KernelError: Triton cannot compile or start the kernel.
    """
    if interpreted():
        kernel[(programs,)](*map(_as_a_device_sees, arguments))
        return None
    first = next(_tensors(arguments))
    # Triton starts a kernel on the current device, whichever device its tensors are on.
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        try:
            # The option for fused multiply-add is explicit, since its default differs between versions of Triton.
            return kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        except Exception as error:
            # After an error of the device, plain torch would fail too. A lack of memory is not a fault of the kernel.
            if "CUDA" in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[:1] or [""]
            raise KernelError(f"the kernel {kernel.__name__} failed: {type(error).__name__}: {reason[0]}") from error


def _as_a_device_sees(argument: Any) -> Any:
    """The argument with floats rounded to float32, as on a device: the interpreter would keep all digits."""
    if isinstance(argument, float):
        return torch.tensor(argument, dtype=torch.float32).item()
    if isinstance(argument, tuple):
        return type(argument)(*map(_as_a_device_sees, argument))  # a named tuple
    return argument


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
