"""The backend "triton": kernels for a GPU, written in the language of the package Triton.

This folder is ``sparse_attn.kernels.triton``; ``import triton`` means the package. The package is
imported at the first call of a kernel or of :func:`status`. In this folder, only ``launch``, ``attention.plan`` and the
``__init__`` files can be imported without the package.
"""

from __future__ import annotations

import functools

import torch

from sparse_attn.versions import mend_interpreter, triton_problem

_OLDEST = (8, 0)  # the oldest compute capability with matrix products of bfloat16
# Major numbers of compute capabilities for which Triton 3.6 and 3.7 fail to compile the attention kernels: see
# scripts/compile_kernels.py.
REFUSED = (10,)

_failure: str | None = None


class KernelError(RuntimeError):
    """A kernel cannot be compiled for the device, or cannot be started on it."""


def status() -> tuple[bool, str]:
    """Whether the kernels are available, and a text that says where they run, or why they are not available."""
    return _of_this_machine() if _failure is None else (False, _failure)


def give_up(why: str) -> None:
    """Make the kernels unavailable in this process, after one of them has failed."""
    global _failure
    _failure = why


@functools.cache
def _of_this_machine() -> tuple[bool, str]:
    if problem := triton_problem():
        return False, problem
    if interpreted():
        return True, "any tensors, slowly, in Triton's interpreter"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.version.hip:
        return False, "the kernels have been compiled for devices of NVIDIA only, got ROCm"
    found = torch.cuda.get_device_capability()
    if found < _OLDEST:
        return False, f"compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer is needed, got {found[0]}.{found[1]}"
    if found[0] in REFUSED:
        return False, f"Triton does not compile the kernels for compute capability {found[0]}.{found[1]}"
    return True, f"CUDA tensors: {torch.cuda.get_device_name()}"


def available() -> bool:
    """Whether the kernels are available."""
    return status()[0]


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors, which ``TRITON_INTERPRET=1`` selects."""
    if triton_problem():
        return False
    from triton import knobs, language  # type: ignore[import-untyped, unused-ignore]
    from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped, unused-ignore]

    # Triton reads the variable at import for its own functions, and later for kernels: both values must agree.
    if not (knobs.runtime.interpret and isinstance(language.sum, InterpretedFunction)):
        return False
    mend_interpreter()
    return True
