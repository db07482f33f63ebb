"""Instructions of a compiled kernel, as `cuobjdump` prints them, and its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia import compiler

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z0-9]+)\S*\s*(.*?);")


class Instruction(NamedTuple):
    """An instruction of the hardware."""

    address: int
    conditional: bool
    name: str
    arguments: str


class Span(NamedTuple):
    """The first and the last instruction of a loop."""

    first: int
    last: int

    def contains(self, other: Span) -> bool:
        """Whether the other loop is inside this one."""
        return self != other and self.first <= other.first and other.last <= self.last


def instructions(cubin: bytes) -> list[Instruction]:
    """All instructions of a kernel and of its subroutines."""
    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    return [
        Instruction(int(address, 16), bool(condition), name, arguments)
        for address, condition, name, arguments in _INSTRUCTION.findall(text)
    ]


def until_exit(code: list[Instruction]) -> list[Instruction]:
    """The instructions of a kernel with one exit, without its subroutines, which compute rare numbers (denormals)."""
    end = next(n for n, one in enumerate(code) if one.name == "EXIT" and not one.conditional)
    return code[: end + 1]


def loops(code: list[Instruction]) -> list[Span]:
    """The loops, in the order of the program: an outer loop before the loops inside it."""
    places = {one.address: number for number, one in enumerate(code)}
    spans = []
    for number, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.arguments) if one.name == "BRA" else None
        if target and int(target[1], 16) < one.address:
            spans.append(Span(places[int(target[1], 16)], number))
    return sorted(spans, key=lambda span: (span.first, -span.last))
