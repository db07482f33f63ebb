"""Weights and masks as short texts: only non-zero weights are written.

Integers are written as one byte each; after a byte of 255, the next byte is added to the number. The bytes are deflated
and written in base64; `decode.js` reads them.
"""

from __future__ import annotations

import base64
import ctypes
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

# The smallest number above 0, and 1/8, as bits of float16.
_SMALLEST = 1
_EIGHTH = 0x3000


@dataclass(frozen=True)
class EncodedMap:
    """The weights of one layer for one example.

    Attributes:
        data: base64 of the deflated bytes: the number of entries of each row; for each entry, the number of keys
            without an entry directly before its key in the row; then the high and the low bytes of the weights as
            float16.
        entries: how many weights are written.
        sizes: how many bytes the first two parts of ``data`` take before they are deflated.
    """

    data: str
    entries: int
    sizes: tuple[int, int]


def to_half_bits(weights: Tensor) -> Tensor:
    """Weights as the bits of float16, in an int32 tensor; no weight other than zero becomes zero."""
    half = weights.float().clamp(-65504, 65504).half()
    bits = half.view(torch.int16).int() & 0xFFFF
    lost = (weights != 0) & (bits & 0x7FFF == 0)
    return torch.where(lost, _SMALLEST | (bits & 0x8000), bits.masked_fill(weights == 0, 0))


def with_fewer_bits(bits: Tensor) -> Tensor:
    """Round weights below 1/8 to float16 without its last two bits; no weight becomes zero.

    This makes a page a tenth smaller. From 6e-5 on, 9 significant bits remain; smaller weights have fewer.
    """
    magnitude = bits & 0x7FFF
    rounded = (magnitude + 2) & 0x7FFC
    changed = (magnitude < _EIGHTH) & (rounded != 0)
    return torch.where(changed, rounded | (bits & 0x8000), bits)


def encode_map(bits: Tensor, at_least: int = _SMALLEST) -> EncodedMap:
    """Write the weights of one layer.

    Args:
        bits: (H, L, S) from :func:`to_half_bits`.
        at_least: smallest magnitude (bits without the sign) that is written.
    """
    rows = bits.flatten(0, 1)
    kept = (rows & 0x7FFF) >= at_least
    row, column = kept.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    distance = torch.where(first, column, column - column.roll(1) - 1)
    counts, distances = _code(kept.sum(-1)), _code(distance)
    values = rows[row, column]
    planes = torch.cat([counts, distances, (values >> 8).to(torch.uint8), (values & 0xFF).to(torch.uint8)])
    return EncodedMap(_packed(planes), len(row), (len(counts), len(distances)))


def encode_mask(visible: Tensor) -> str:
    """Write a bool mask (L, S) as the lengths of its runs, row after row, beginning with False."""
    flat = visible.flatten()
    changes = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    ends = torch.cat([changes, torch.tensor([len(flat)])])
    lengths = torch.diff(ends, prepend=torch.tensor([0]))
    if len(flat) and bool(flat[0]):
        lengths = torch.cat([torch.tensor([0]), lengths])
    return _packed(_code(lengths))


def smallest_kept(histogram: Tensor, limit: int) -> int:
    """The smallest weight, as bits, that is kept when at most ``limit`` entries are kept.

    Args:
        histogram: how often each of the 32,768 magnitudes occurs.
        limit: how many entries may be kept.
    """
    as_large = histogram.flip(0).cumsum(0).flip(0)
    return max(int((as_large > limit).sum()), _SMALLEST)


def _code(numbers: Tensor) -> Tensor:
    full = numbers // 255
    ends = (full + 1).cumsum(0)
    code = torch.full((int(ends[-1]) if len(ends) else 0,), 255, dtype=torch.uint8)
    code[ends - 1] = (numbers % 255).to(torch.uint8)
    return code


def _packed(code: Tensor) -> str:
    code = code.contiguous()
    raw = ctypes.string_at(code.data_ptr(), code.numel()) if code.numel() else b""
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
