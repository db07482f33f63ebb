"""Compiles the kernels in C into one shared library.

The build of the package runs this file, so the file needs only the standard library.

For development: ``python sparse_attn/kernels/cpu/build.py`` puts the library beside this file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

LIBRARY = "rows.shared"  # Python does not import a file with this suffix as an extension module

_SOURCES = Path(__file__).resolve().parent
_FLAGS = [
    *("-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function"),
    # Only those parts of -ffast-math that do not change NaN, infinities or the order of a sum.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
_X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mpopcnt"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mpopcnt", "-mprefer-vector-width=512"],
}
# Flags for the variant avx512_bf16. Only attention in C's type float, which also computes bfloat16, is compiled with
# these flags. The other kernels of this variant are the kernels of avx512. Compilers before 2020 do not know these
# instructions.
_BFLOAT16 = [*_X86_VARIANTS["avx512"], "-mavx512bf16"]
# Attention in float32 with tiles (AMX), on Linux only. No flag allows AMX: its instructions are in assembler, because
# the compiler itself must not use tiles.
_TILES = [*_BFLOAT16, "-DWITH_TILES"]


def build(target_dir: str | Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile and link the library into ``target_dir``.

    Args:
        target_dir: An existing folder.
        extra_flags: More flags for every call of the compiler.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: There is no C compiler, or it failed; the message contains its output.
    """
    compiler = _compiler()
    variants = {"baseline": [], **(_X86_VARIANTS if _targets_x86_64(compiler) else {})}
    common = [*compiler, *_FLAGS, "-include", str(_SOURCES / "glibc.h"), *extra_flags]
    target = Path(target_dir) / LIBRARY
    with tempfile.TemporaryDirectory() as folder:
        objects: list[str] = []

        def compile_source(source: str, name: str, flags: list[str]) -> None:
            objects.append(os.path.join(folder, f"{name}.o"))
            _run([*common, *flags, "-c", str(_SOURCES / f"{source}.c"), "-o", objects[-1]])

        with_x86 = ["-DWITH_X86_VARIANTS"] if len(variants) > 1 else []
        if with_x86 and _knows_bfloat16(compiler):
            with_x86.append("-DWITH_AVX512_BF16")
            kinds = {"avx512_bf16": _BFLOAT16}
            if _knows_tiles(compiler):
                with_x86.append("-DWITH_AVX512_AMX")
                kinds["avx512_amx"] = _TILES
                compile_source("amx", "amx", [*_TILES, "-DREAL_FLOAT"])
            for variant, flags in kinds.items():
                for source in ("attention_forward", "attention_backward"):
                    defines = [f"-DVARIANT={variant}", "-DROW_VARIANT=avx512", "-DREAL_FLOAT"]
                    compile_source(source, f"{source}_{variant}", [*flags, *defines])
        for source in ("threads", "rows", "attention"):
            compile_source(source, source, with_x86)
        for variant, flags in variants.items():
            for real in ("FLOAT", "DOUBLE"):
                for source in ("row", "attention_forward", "attention_backward"):
                    defines = [f"-DVARIANT={variant}", f"-DREAL_{real}"]
                    compile_source(source, f"{source}_{real}_{variant}", [*flags, *defines])
        # The file gets another name first and is then renamed: a process that has loaded the old library keeps it.
        fresh = os.path.join(folder, LIBRARY)
        _run([*common, "-shared", *objects, "-o", fresh, "-lm", "-pthread"])
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(fresh, beside)
        os.replace(beside, target)
    return target


def target() -> str:
    """The target of the C compiler, such as ``x86_64-linux-gnu``.

    Raises:
        RuntimeError: There is no C compiler, or it failed.
    """
    return _run([*_compiler(), "-dumpmachine"]).strip()


def _compiler() -> list[str]:
    for command in (os.environ.get("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command) if command else []
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("no C compiler found (CC, cc, gcc, clang)")


def _targets_x86_64(compiler: list[str]) -> bool:
    macros = _run([*compiler, "-dM", "-E", "-x", "c", os.devnull])
    return "#define __x86_64__ 1" in macros


def _knows_bfloat16(compiler: list[str]) -> bool:
    """Whether the compiler knows the flag ``-mavx512bf16``, and ``avx512bf16`` in ``__builtin_cpu_supports``."""
    program = 'int supported(void) { return __builtin_cpu_supports("avx512bf16"); }'
    command = [*compiler, "-mavx512bf16", "-S", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0


def _knows_tiles(compiler: list[str]) -> bool:
    """Whether the target is Linux, and the assembler knows the instructions for tiles (binutils from 2.36 on)."""
    program = """
        #ifndef __linux__
        #error "the variant asks Linux for the permission to use tiles"
        #endif
        void multiply(void) { __asm__("tdpbf16ps %tmm2, %tmm1, %tmm0"); }
    """
    command = [*compiler, "-c", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{error.stderr.strip()}") from error


if __name__ == "__main__":
    print(build(_SOURCES))
