"""Row kernels on a GPU: the contract of ``kernels.reference.entmax``, computed in float32 also for half precision.

A row of up to 16,384 entries is read once and stays on the chip; a longer row is read in chunks, several times. For the
gradient for α, the limit is 8,192 entries.
``rows_forward`` and ``rows_backward`` have the kernels.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparse_attn.kernels.triton.family import GENERAL, MODES, SOFTMAX
from sparse_attn.kernels.triton.launch import launch
from sparse_attn.kernels.triton.rows_backward import backward_in_chunks, backward_on_chip
from sparse_attn.kernels.triton.rows_forward import forward_in_chunks, forward_on_chip

_ON_CHIP = 2**14
_CHUNK = 2**13
_OF_A_WARP = 2**10  # entries: 32 for each thread


class Tile(NamedTuple):
    """The shape in which a program holds rows: entry ``e`` of a row is at ``(e // lanes, row, e % lanes)``.

    Few threads share a row, because every thread of a row repeats the computations that are needed once per row. The
    entries of a lane belong to one thread.
    """

    entries: int  # number of entries of a lane
    rows: int
    lanes: int
    warps: int

    @staticmethod
    def of(size: int) -> Tile:
        """The tile for rows of this size."""
        block = max(triton.next_power_of_2(size), 16)
        lanes = max(block // 8, 16)
        return Tile(block // lanes, max(128 // lanes, 1), lanes, max(block // _OF_A_WARP, 1))


def entmax_forward(
    scores: Tensor, a: float | Tensor, lowest: float, k: int | None = None, *, in_place: bool = False
) -> Tensor:
    """The probabilities. Scores at or below ``lowest`` are masked; a fully masked row is all zeros.

    A row with NaN or ``+inf``, or with α outside ``(0, inf)``, is NaN throughout. With ``k``, only the k largest scores
    of each row take part; ties go to the lowest index. ``in_place`` allows the scores to be overwritten.
    """
    size = scores.shape[-1]
    if k is not None and size > _ON_CHIP:
        index = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores).scatter_(-1, index, entmax_forward(scores.gather(-1, index), a, lowest))
    reuse = in_place and scores.is_contiguous()  # every entry is read before it is written
    p = scores if reuse else torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if not p.numel():
        return p
    x = scores.reshape(-1, size)
    per_row, number, mode = _parameter(a, scores)
    arguments = (x, per_row, p, number, lowest, len(x), size, *x.stride())
    if size <= _ON_CHIP:
        tile = Tile.of(size)
        top_k = (k or 0, mode, *tile[:3], k is not None)
        launch(forward_on_chip, triton.cdiv(len(x), tile.rows), *arguments, *top_k, warps=tile.warps)
    else:
        launch(forward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return p


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the scores in the dtype of ``p``; and the gradient for α in float32, one per row ``(..., 1)``.

    The second is None without ``with_alpha``.

    Where ``p`` is 0 the gradient is 0 for any ``grad``, so the function serves the top-k mapping too.
    """
    result = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    grad_a = torch.zeros((*p.shape[:-1], 1), dtype=torch.float32, device=p.device) if with_alpha else None
    if not p.numel():
        return result, grad_a
    size = p.shape[-1]
    x, g = p.reshape(-1, size), grad.reshape(-1, size)
    per_row, number, mode = _parameter(a, p)
    arguments = (x, g, per_row, result, grad_a, number, len(x), size, *x.stride(), *g.stride())
    mode = GENERAL if with_alpha or mode == SOFTMAX else mode
    if size <= (_ON_CHIP // 2 if with_alpha else _ON_CHIP):  # for α, a program holds more tensors
        tile = Tile.of(size)
        warps = min(2 * tile.warps, 16)
        launch(backward_on_chip, triton.cdiv(len(x), tile.rows), *arguments, mode, *tile[:3], warps=warps)
    else:
        launch(backward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return result, grad_a


def _parameter(a: float | Tensor, x: Tensor) -> tuple[Tensor | None, float, int]:
    """``a`` per row, or as a number, and the mode of the kernels."""
    if not isinstance(a, Tensor):
        return None, a, SOFTMAX if a == 0.0 else MODES.get(a, GENERAL)
    return a.expand(*x.shape[:-1], 1).reshape(-1).contiguous(), 0.0, GENERAL
