"""Each C header compiles alone, at every vector width, for float and for double."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparse_attn.kernels.cpu import build

HEADERS = sorted(Path(build.__file__).parent.glob("*.h"))


def compiler() -> list[str] | None:
    try:
        return build._compiler()
    except RuntimeError:
        return None


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("header", HEADERS, ids=[header.name for header in HEADERS])
def test_a_header_compiles_alone(header):
    command = compiler()
    variants: list[list[str]] = [[]]
    if build._targets_x86_64(command):
        variants += build._X86_VARIANTS.values()
        variants += [build._BFLOAT16, build._TILES] if build._knows_bfloat16(command) else []
    for flags in variants:
        for real in ("FLOAT", "DOUBLE"):
            checks = ["-std=c11", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror"]
            alone = [*command, *checks, *flags, f"-DREAL_{real}", "-x", "c", "-include", str(header), "/dev/null"]
            done = subprocess.run(alone, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
