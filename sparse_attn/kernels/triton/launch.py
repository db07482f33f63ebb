"""How a kernel is started: on the device of its tensors, with the compiler's options that the kernels count on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.triton import interpreted


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have for itself; without a device those of compute capability 9.0."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
    """Start ``programs`` programs of a kernel; the first argument is a tensor, whose device is used."""
    first: Tensor = arguments[0]
    if interpreted():  # where a number would keep the digits that a device takes from it
        numbers = (torch.tensor(x, dtype=torch.float32).item() if isinstance(x, float) else x for x in arguments)
        kernel[(programs,)](*numbers)
        return
    # A kernel is started on the current device, whatever its tensors are on.
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        # Fused multiplications and additions are asked for by name: the default changes between versions.
        kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
