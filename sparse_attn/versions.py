"""Differences between the supported versions of Python, torch, Triton and transformers.

Each difference has one name here and says with which version it ends. No other module of the package asks for a
version. ``docs/versions.md`` lists the versions that the tests have passed with and what the older ones cannot do.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any, TypeVar

if sys.version_info < (3, 10):  # noqa: UP036  pip checks this, but a checkout can be imported without pip
    raise ImportError(f"sparse_attn needs Python 3.10 or newer, got {sys.version.split()[0]}")

import torch


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version: 2.6.0a0+git counts as 2.6."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


TORCH = _numbers(torch.__version__)
_Function = TypeVar("_Function", bound=Callable[..., Any])

if TORCH < (2, 6):
    raise ImportError(f"sparse_attn needs torch 2.6 or newer, got {torch.__version__}")


def constant_in_compiled_code(function: _Function) -> _Function:
    """Let Dynamo take the result of a function as a constant.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but imports Dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def triton_version() -> str | None:
    """The version of the installed Triton, or None. Triton is not imported for this, since the import takes long."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def triton_before(major: int, minor: int) -> bool:
    """Whether the installed Triton is older than a version, or missing."""
    return _numbers(triton_version() or "0.0") < (major, minor)


def triton_problem() -> str | None:
    """The reason why Triton cannot be used; None if it can."""
    found = triton_version()
    if found is None:
        return "Triton is not installed"
    return f"Triton 3.4 or newer is needed, got {found}" if triton_before(3, 4) else None


# Torch before 2.8 includes an older Triton, which matters only if there is a GPU.
if triton_version() and triton_problem() and (TORCH >= (2, 8) or torch.cuda.device_count()):
    warnings.warn(f"the GPU kernels of sparse_attn are not used: {triton_problem()}", stacklevel=2)


def check_transformers() -> None:
    """Raise if transformers is older than 5.16.

    In 5.15, modules of ViT have other names; in older versions, T5 has no attention interface.
    """
    found = metadata.version("transformers")
    if _numbers(found) < (5, 16):
        raise ImportError(f"sparse_attn needs transformers 5.16 or newer, got {found}")


def is_exporting() -> bool:
    """Whether ``torch.export`` is running, also while Dynamo traces for an export.

    Before torch 2.13, ``torch.compiler.is_exporting()`` is also true inside ``torch.compile``; the variable that this
    function reads has the correct value there. Torch 2.6 has neither the function nor the variable.
    """
    if TORCH >= (2, 13):
        return torch.compiler.is_exporting()
    if TORCH >= (2, 7):
        return torch.compiler._is_exporting_flag
    return _dynamo_is_exporting() if torch.compiler.is_dynamo_compiling() else torch.compiler._is_compiling_flag


@constant_in_compiled_code
def _dynamo_is_exporting() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return bool(InstructionTranslator.current_tx().export)


def fx_traces() -> bool:
    """Whether ``torch.fx`` or ``make_fx`` is tracing, without the warning of torch's public function.

    The flag that is read in older versions exists up to torch 2.13.
    """
    if TORCH >= (2, 14):
        return torch.fx._symbolic_trace._get_is_fx_tracing()  # type: ignore[attr-defined, unused-ignore]
    return torch.fx._symbolic_trace._is_fx_tracing_flag


def loops_export() -> bool:
    """Whether every exporter can write a ``while_loop``, also to ONNX; if not, an export contains single steps.

    Torch 2.6 exports a loop only in strict mode; before 2.9, ONNX has no loop; before 2.13, a loop loses the
    information about which sizes are 1.
    """
    return TORCH >= (2, 13)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for a device without autocast, for which torch raises."""
    return _autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@constant_in_compiled_code
def _autocast_available(device_type: str) -> bool:
    """Call torch's function, which Dynamo before 2.13 cannot trace."""
    return torch.amp.is_autocast_available(device_type)


def tf32_allowed() -> bool:
    """Whether float32 matrix products may round their factors to TF32 on a GPU, by either of torch's two settings.

    Torch before 2.9 has only the older setting.
    """
    if TORCH >= (2, 9):
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


@functools.cache
def mend_interpreter() -> None:
    """Repair loops in the interpreter of Triton before 3.7, which converts arrays to ints: numpy 2.5 refuses this."""
    if not triton_before(3, 7):
        return
    from triton.runtime import interpreter  # type: ignore[import-untyped, unused-ignore]

    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = with_index
