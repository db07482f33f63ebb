"""The compiled row kernels, called through ctypes: ``kernels.reference.entmax`` for CPU tensors.

Scores are float32, float64, float16 or bfloat16 with any strides, and are mapped along the last dimension. Half
precision is computed in float32 and rounded once; for α > 2 every dtype is computed in float64. ``a = α - 1`` is a
number above -1, or a tensor with one value per row, which broadcasts with size 1 in the last dimension. Not
differentiable: ``kernels.functions`` adds gradients.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.kernels.cpu.build import LIBRARY

_INTERFACE = 5
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class _Library(NamedTuple):
    forward: Any
    backward: Any
    attention: Any
    multipliers: Any
    variants: dict[str | None, int]  # None stands for the last variant


@functools.cache
def _load() -> _Library | str:
    """The library, or the reason why it cannot be loaded."""
    path = Path(__file__).with_name(LIBRARY)
    if not path.exists():
        return f"no compiled library at {path}: the installation builds it if it finds a C compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled library cannot be loaded: {error}"
    if library.rows_interface() != _INTERFACE:
        return f"{path} belongs to another version of sparse_attn: install sparse_attn again"
    library.rows_variant.restype = c_char_p
    variants: dict[str | None, int] = {}
    while name := library.rows_variant(len(variants)):
        variants[name.decode()] = len(variants)
    variants[None] = max(variants.values())
    # variant, threads, rank, layout, type, scores or p, then a or the gradient
    shared = (c_int, c_int, c_int, POINTER(c_int64), c_int, c_void_p, c_void_p)
    library.rows_forward.argtypes = (*shared, c_int64, c_double, c_void_p)
    library.rows_backward.argtypes = (*shared, c_void_p, c_void_p, c_void_p)
    # variant, threads, whether backward, the members of `attention` and of `attention_data` in attention.h
    library.attention_run.argtypes = (c_int, c_int, c_int, c_char_p, c_char_p)
    # seed, probability, first row, rows, keys, output
    library.attention_multipliers.argtypes = (c_int64, c_double, c_int64, c_int64, c_int64, c_void_p)
    attention = (library.attention_run, library.attention_multipliers)
    return _Library(library.rows_forward, library.rows_backward, *attention, variants)


def library() -> _Library:
    """The library; raises a RuntimeError with the reason if there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def variants() -> list[str]:
    """The variants in the library that this processor can run, the default last; empty if there is no library."""
    library = _load()
    return [] if isinstance(library, str) else [name for name in library.variants if name]


def available() -> bool:
    """Whether the compiled kernels are available."""
    return not isinstance(_load(), str)


def status() -> tuple[bool, str]:
    """Whether the compiled kernels are available, and a text that says how they run, or why they are not available."""
    library = _load()
    if isinstance(library, str):
        return False, library
    threads = torch.get_num_threads()
    return True, f"{variants()[-1]}, {threads} thread{'s' if threads > 1 else ''}"


def entmax_forward(
    scores: Tensor,
    a: float | Tensor,
    lowest: float,
    k: int | None = None,
    *,
    in_place: bool = False,
    variant: str | None = None,
) -> Tensor:
    """The probabilities. Scores at or below ``lowest`` are masked; a fully masked row is all zeros.

    With ``k`` only the k largest scores of each row take part; ties go to the lowest index. A row with NaN or ``+inf``
    is NaN throughout. ``in_place`` overwrites the scores if they are contiguous; ``variant`` forces one of
    :func:`variants`.
    """
    loaded, shape = library(), scores.shape
    p = scores if in_place and scores.is_contiguous() else torch.empty(shape, dtype=scores.dtype, device="cpu")
    if scores.numel():
        rank = len(shape)
        number, address, strides = _alpha(a, rank)
        layout = (c_int64 * (3 * rank))(*shape, *scores.stride(), *strides)
        head = loaded.variants[variant], torch.get_num_threads(), rank, layout, ELEMENTS[scores.dtype]
        check(loaded.forward(*head, scores.data_ptr(), address, k or 0, lowest, p.data_ptr()))
        del number  # kept alive until here: the call used its address
    return p


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, with_alpha: bool = False, *, variant: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the scores in the dtype of ``p`` and, if wanted, for α per row ``(..., 1)`` in float32 or wider.

    Where ``p`` is 0 the gradient is 0 for any ``grad``, so the function serves the top-k mapping too.
    """
    if p.dtype in (torch.float16, torch.bfloat16):
        grad_scores, grad_a = entmax_backward(p.float(), a, grad, with_alpha, variant=variant)
        return grad_scores.to(p.dtype), grad_a
    loaded, shape = library(), p.shape
    grad_scores = torch.empty(shape, dtype=p.dtype, device="cpu")
    grad_a = torch.zeros((*shape[:-1], 1), dtype=torch.float64, device="cpu") if with_alpha else None
    if p.numel():
        rank = len(shape)
        grad = grad.to(p.dtype)
        number, address, strides = _alpha(a, rank)
        layout = (c_int64 * (4 * rank))(*shape, *p.stride(), *grad.stride(), *strides)
        head = loaded.variants[variant], torch.get_num_threads(), rank, layout, ELEMENTS[p.dtype]
        results = grad_scores.data_ptr(), None if grad_a is None else grad_a.data_ptr()
        check(loaded.backward(*head, p.data_ptr(), grad.data_ptr(), address, *results))
        del number
    if grad_a is None:
        return grad_scores, None
    return grad_scores, grad_a.to(torch.promote_types(p.dtype, torch.float32))


def _alpha(a: float | Tensor, rank: int) -> tuple[object, object, list[int]]:
    """``a`` in float64, its address and its ``rank`` strides.

    The caller must keep the first object alive while the address is in use.
    """
    if not isinstance(a, Tensor):
        number = c_double(a)
        return number, ctypes.byref(number), [0] * rank
    wide = a.to(torch.float64)
    steps = [0 if size == 1 else step for size, step in zip(wide.shape, wide.stride(), strict=True)]
    return wide, wide.data_ptr(), [0] * (rank - len(steps)) + steps


def check(failed: int) -> None:
    """Raise if a call has failed."""
    if failed:
        raise MemoryError("the kernels in C could not allocate their buffers")
