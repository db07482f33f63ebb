"""Tests of the variant ``avx512_amx`` on processors without AMX: `amx_emulator.c` executes the AMX instructions."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from sparse_attn.kernels.cpu import build, rows

VARIANT = "avx512_amx"
_SOURCE = Path(__file__).with_name("amx_emulator.c")
_NUMBER = 4  # the place of the variant in variants.h


def library() -> ctypes.CDLL:
    """The compiled kernels."""
    return ctypes.CDLL(str(Path(rows.__file__).with_name(build.LIBRARY)))


def why_not() -> str | None:
    """The reason why the variant cannot be tested here, if there is one."""
    if "avx512_bf16" not in rows.variants() or not sys.platform.startswith("linux"):
        return "needs AVX512-BF16 and Linux"
    if not hasattr(library(), "amx_product_is_exact"):
        return "the compiler knew no AMX when the library was built"
    try:
        build._compiler()
    except RuntimeError as error:
        return str(error)
    return None


def compile_emulator(folder: Path) -> Path:
    """Compile the emulator into a folder."""
    target = folder / "amx_emulator.so"
    flags = ("-std=c11", "-O2", "-mfma", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run([*build._compiler(), *flags, str(_SOURCE), "-o", str(target), "-lm"], check=True)
    return target


def load_emulator(path: Path) -> ctypes.CDLL:
    """Load the compiled emulator, and make the variant known to this process."""
    rows.library().variants.setdefault(VARIANT, _NUMBER)
    return ctypes.CDLL(str(path))
