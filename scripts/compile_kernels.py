"""Compile the Triton kernels for a GPU that need not be there, and show what each asks of it.

    python scripts/compile_kernels.py [rows attention]

Calls the functions that start kernels, on small CPU tensors, with a compiler for compute capability 9.0 in the place of
the start. What does not compile raises. Prints registers, spilled bytes and shared memory of every kernel that they
would start; a kernel that spills is slow, one that asks for more shared memory than there is would not start.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # what the interpreter has taken over cannot be compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource

from sparse_attn.kernels.triton import attention, attention_backward, rows
from sparse_attn.kernels.triton.plan import Setting

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes that a program can have on this target
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def compile_kernel(kernel: Any, *arguments: Any, warps: int, stages: int) -> triton.compiler.CompiledKernel:
    """The kernel as it would be compiled for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        fixed = parameter.is_constexpr or value is None
        free = not parameter.do_not_specialize
        if fixed or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and free):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGET, options=options)


def resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills."""
    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def compile_instead(variant: str) -> Callable[..., None]:
    """What takes the place of ``launch``, and prints a line for each kernel."""

    def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
        began = time.perf_counter()
        compiled = compile_kernel(kernel, *arguments, warps=warps, stages=stages)
        seconds = time.perf_counter() - began
        registers, spilled = resources(compiled)
        shared = compiled.metadata.shared
        print(f"{kernel.__name__:24} {variant:44} {warps:5} {registers:5} {spilled:6} {shared:7} {seconds:5.1f}")
        if shared > SHARED_MEMORY:
            raise RuntimeError(f"{kernel.__name__} asks for {shared} bytes of shared memory, there are {SHARED_MEMORY}")

    return launch


def compile_rows() -> None:
    """Row kernels: every mode, rows that stay on the chip and rows that do not, both passes."""
    for size in (61, 16384, 50257):
        for dtype in (torch.float32,):
            x = torch.zeros(2, size, dtype=dtype)
            for name, a in (("1.5", 0.5), ("per row", torch.zeros(2, 1))):
                rows.launch = compile_instead(f"{size} {str(dtype)[6:]} α {name}")
                rows.entmax_forward(x, a, -1e38)
                rows.entmax_backward(x, a, x, with_alpha=name == "per row")
        rows.launch = compile_instead(f"{size} top-k")
        rows.topk_entmax_forward(x, 3, 0.0, -1e38)


def compile_attention() -> None:
    """Attention: every mode and mask, head sizes, short and long, with all that has to be compiled anew for it."""
    number, per_head = {"alpha": None}, {"alpha": torch.ones(2)}
    every = {"mask": torch.zeros(1, 1, 1, 5000), "dropout_p": 0.1, "offset": 0}
    for name, size, dtype, keys, how in (
        ("α 1.5", 64, torch.bfloat16, 5000, number),
        ("α 1.5, causal", 64, torch.bfloat16, 5000, {"offset": 0, **number}),
        ("α per head, causal", 64, torch.bfloat16, 5000, {"offset": 0, **per_head}),
        ("α per head, everything", 64, torch.bfloat16, 5000, {**every, **per_head}),
        ("α 1.5", 64, torch.bfloat16, 1024, number),
        ("α per head", 64, torch.bfloat16, 1024, per_head),
        ("α per head", 64, torch.bfloat16, 512, per_head),
        ("α per head", 128, torch.bfloat16, 512, per_head),
        ("α per head", 128, torch.bfloat16, 5000, per_head),
        ("α per head", 256, torch.bfloat16, 5000, per_head),
        ("α per head", 64, torch.float32, 5000, per_head),
        ("α per head", 64, torch.float32, 512, per_head),
        ("α per head", 128, torch.float32, 5000, per_head),
        ("α per head", 256, torch.float32, 5000, per_head),
    ):
        variant = f"{name}; D {size} {str(dtype)[6:]} S {keys}"
        attention.launch = attention_backward.launch = compile_instead(variant)
        query, key = torch.zeros(1, 2, 256, size, dtype=dtype), torch.zeros(1, 2, keys, size, dtype=dtype)
        compile_both(query, key, **how)


def compile_both(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    offset: int | None = None,
) -> None:
    """Forward and backward."""
    setting = Setting(0.5, 0.125, dropout_p, offset)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    tensors = (alpha, mask, None, seed)
    output, *kept = attention.forward(query, key, key, *tensors, setting, True, alpha is not None)
    attention_backward.backward(output, query, key, key, *tensors, *kept, setting, alpha is not None, mask is not None)


PARTS = {"rows": compile_rows, "attention": compile_attention}


def main() -> None:
    """Compile the parts named on the command line, or all."""
    warnings.simplefilter("error")
    print(f"{'kernel':24} {'variant':44} warps  regs  spill  shared  s")
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
