"""Products with a mostly zero matrix, such as the weights of sparse attention, by the compiled kernels.

Matrices are float32 or float64 on the CPU, with a last dimension of stride 1.
"""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows

_GATHERED, _SCATTERED, _SAMPLED, _COUNTED = range(4)
_DTYPES = (torch.float32, torch.float64)
_ZEROS_PER_ENTRY = 8


def worth_it(p: Tensor, *others: Tensor) -> bool:
    """Whether the kernels accept these matrices and are faster than dense products: ``p`` is nearly all zero."""
    matrices = (p, *others)
    if p.dtype not in _DTYPES or any(x.dtype != p.dtype or x.stride(-1) != 1 for x in matrices):
        return False
    counts = torch.empty(len(p), 1, dtype=torch.int64)
    _multiply(_COUNTED, p, p, p, counts, 0)
    return _ZEROS_PER_ENTRY * int(counts.sum()) < p.numel()


def gathered(p: Tensor, x: Tensor) -> Tensor:
    """``p @ x``, as in :mod:`sparse_attn.kernels.plain.products`."""
    out = torch.empty(len(p), x.shape[1], dtype=p.dtype)
    _multiply(_GATHERED, p, x, x, out, x.shape[1])
    return out


def scatter_(out: Tensor, p: Tensor, x: Tensor) -> None:
    """``out += p.T @ x``; ``x`` and ``out`` are not read where ``p`` is zero."""
    _multiply(_SCATTERED, p, x, x, out, x.shape[1])


def sampled(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` where ``p`` is not zero, 0 elsewhere."""
    out = torch.empty(p.shape, dtype=p.dtype)
    _multiply(_SAMPLED, p, x, y, out, x.shape[1])
    return out


def _multiply(kind: int, p: Tensor, x: Tensor, y: Tensor, out: Tensor, width: int) -> None:
    library = rows.library()
    sizes = (c_int64 * 7)(*p.shape, width, p.stride(0), x.stride(0), y.stride(0), out.stride(0))
    head = library.variants[None], torch.get_num_threads(), kind, int(p.dtype == torch.float64), sizes
    rows.check(library.product(*head, p.data_ptr(), x.data_ptr(), y.data_ptr(), out.data_ptr()))
