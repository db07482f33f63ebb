"""Compile the Triton kernels for a GPU, which need not be present, and show the resources that each kernel needs.

    python scripts/compile_kernels.py [rows attention decode few] [--for 80 86 89 90 100 120]

All kernels take five minutes or more; `few` compiles a few variants of each.

The script calls the functions that start kernels, on small CPU tensors, and compiles each kernel for a compute
capability (90, for 9.0, if none is given) instead of starting it. The script prints registers, spilled bytes
and shared memory of every kernel: a kernel that spills is slow, and a kernel that needs more shared memory than the
device has would not start. The exit status is 1 if a kernel does not compile, or would not start, for a capability
that `sparse_attn` does not refuse.
"""

from __future__ import annotations

import argparse
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

os.environ.pop("TRITON_INTERPRET", None)  # functions defined for the interpreter cannot be compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource

from sparse_attn.kernels import triton as backend
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton import rows
from sparse_attn.kernels.triton.attention import backward, decode, dropout, forward, plan

# largest shared memory of a program in KiB, by compute capability
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
target = 90
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
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(value: Any, place: tuple[int, ...], parameter: Any) -> Any:
        """The type of an argument or of its field. Values that are known at compile time are stored as constants."""
        if isinstance(value, tuple):
            return type(value)(*(type_of(field, (*place, n), parameter) for n, field in enumerate(value)))
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and free):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    signature = {
        parameter.name: type_of(value, (position,), parameter)
        for position, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True))
    }
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def compile_instead(variant: str) -> Callable[..., None]:
    """The replacement of ``launch``, which compiles and prints a line for each kernel."""

    def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
        began = time.perf_counter()
        compiled = compile_kernel(kernel, *arguments, warps=warps, stages=stages)
        seconds = time.perf_counter() - began
        registers, spilled = resources(compiled)
        shared = compiled.metadata.shared
        print(f"{kernel.__name__:24} {variant:60} {warps:5} {registers:5} {spilled:6} {shared:7} {seconds:5.1f}")
        if shared > (there := SHARED_MEMORY[target] * 1024):
            raise RuntimeError(f"{kernel.__name__} asks for {shared} bytes of shared memory, there are {there}")

    return launch


def compile_rows(sizes: tuple[int, ...] = (61, 1024, 16384, 50257)) -> None:
    """Row kernels: rows that stay on the chip and rows that do not, α = 1.5 and α per row, softmax and top-k."""
    for size in sizes:
        x = torch.zeros(2, size)
        for name, a in (("1.5", 0.5), ("per row", torch.zeros(2, 1))):
            rows.launch = compile_instead(f"{size} α {name}")
            rows.entmax_forward(x, a, -1e38)
            rows.entmax_backward(x, a, x, with_alpha=name == "per row")
        rows.launch = compile_instead(f"{size} softmax, top-k")
        rows.entmax_forward(x, 0.0, -1e38)
        rows.entmax_forward(x, 0.0, -1e38, 3)


def compile_attention() -> None:
    """Attention without dropout and masks other than causal ones: α = 1.5 and per head, head sizes, dtypes, lengths."""
    per_head = torch.ones(2)
    for how, size, dtype, keys in (
        ({}, 64, torch.bfloat16, 5000),
        ({"offset": 0}, 64, torch.bfloat16, 5000),
        ({"offset": 0, "alpha": per_head}, 64, torch.bfloat16, 5000),
        ({}, 64, torch.bfloat16, 1024),
        ({"alpha": per_head}, 64, torch.bfloat16, 1024),
        ({"alpha": per_head}, 64, torch.bfloat16, 512),
        ({"alpha": per_head}, 128, torch.bfloat16, 512),
        ({"alpha": per_head}, 128, torch.bfloat16, 5000),
        ({"alpha": per_head}, 256, torch.bfloat16, 5000),
        ({"alpha": per_head}, 64, torch.float32, 5000),
        ({"alpha": per_head}, 64, torch.float32, 32),
        ({"alpha": per_head}, 128, torch.float32, 5000),
        ({"alpha": per_head}, 256, torch.float32, 5000),
    ):
        compile_both(256, keys, size, dtype, **how)


def compile_few() -> None:
    """A few variants of each kernel, one of attention with a mask and dropout."""
    compile_rows((61, 50257))
    everything = {"alpha": torch.ones(2), "mask": torch.zeros(1, 1, 1, 5000), "dropout_p": 0.1, "offset": 0}
    compile_both(256, 5000, 64, torch.bfloat16, **everything)
    compile_both(256, 512, 64, torch.float16, alpha=torch.ones(2))
    compile_both(1, 1, 1, torch.float32, heads=1)  # Triton specialises on integers that are 1
    compile_decode()


def compile_decode() -> None:
    """Decoding with a single query, and with few queries, a mask and dropout."""
    decode.launch = dropout.launch = compile_instead("one query, one head")
    rows.launch = compile_instead("one query, one head")
    one, cache = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 3000, 64, dtype=torch.bfloat16)
    decode.forward(one, cache, cache, None, None, None, None, Setting(0.5, 0.125, 0.0, None))
    decode.launch = dropout.launch = rows.launch = compile_instead("grouped heads, everything")
    query, key = torch.zeros(2, 8, 2, 128, dtype=torch.bfloat16), torch.zeros(2, 2, 3000, 128, dtype=torch.bfloat16)
    lengths, seed, mask = (
        torch.ones(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 1, 1, 3000),
    )
    decode.forward(query, key, key, torch.ones(8), mask, lengths, seed, Setting(0.0, 0.125, 0.1, 2998))


def compile_both(
    queries: int,
    keys: int,
    size: int,
    dtype: torch.dtype,
    *,
    heads: int = 2,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    offset: int | None = None,
) -> None:
    """Forward and backward of an attention call."""
    given = {"α per head": alpha is not None, "mask": mask is not None, "dropout": dropout_p, "causal": offset == 0}
    variant = ", ".join([f"L {queries} S {keys} D {size} {str(dtype)[6:]}", *(name for name in given if given[name])])
    forward.launch = backward.launch = compile_instead(variant)
    query, key = torch.zeros(1, heads, queries, size, dtype=dtype), torch.zeros(1, heads, keys, size, dtype=dtype)
    setting = Setting(0.5, 0.125, dropout_p, offset)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    tensors = (alpha, mask, None, seed)
    output, *kept = forward.forward(query, key, key, *tensors, setting, True)
    wanted = (alpha is not None, mask is not None)
    backward.backward(output, query, key, key, *tensors, *kept, setting, *wanted)


PARTS = {"rows": compile_rows, "attention": compile_attention, "decode": compile_decode, "few": compile_few}


def aim_at(capability: int) -> None:
    """Compile for this capability from now on, with the plans of its devices."""
    global target
    target = capability
    plan.shared_memory = forward.shared_memory = lambda device: SHARED_MEMORY[capability] * 1024


def main() -> int:
    """Compile the parts named on the command line, or all, for each of the capabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; by default, all except few")
    parser.add_argument("--for", nargs="+", type=int, default=[90], choices=SHARED_MEMORY, dest="capabilities")
    options = parser.parse_args()
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"a part must be one of {', '.join(PARTS)}, got {wrong[0]}")
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)  # Triton itself uses parts of `ast` that Python 3.13 deprecates
    failed = False
    for capability in options.capabilities:
        aim_at(capability)
        print(f"{f'kernel, for {capability}':24} {'variant':60} warps  regs  spill  shared  s")
        refused = capability // 10 in backend.REFUSED
        try:
            for part in options.parts or ("rows", "attention", "decode"):
                PARTS[part]()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"FAILED for {capability}, {'refused' if refused else 'NOT refused'} by sparse_attn: {reason}")
            failed |= not refused
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
