"""Dropout whose mask is drawn four entries at a time on a CPU.

``torch.nn.functional.dropout`` draws its mask on a CPU by ``bernoulli_``, one entry after the other, which takes nine
tenths of the function's time. Here each 64-bit random number decides about four entries, with 16 bits for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.transforms import values_known

_LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout(x, p)`` in training, with another mask of the same distribution.

    The mask is a function of torch's random state, so seeds and activation checkpointing work as with torch's function.
    Torch's function runs on other devices, under ``torch.compile`` (which fuses it) and under every transform.

    Args:
        x: Of any shape and floating dtype.
        p: Probability of a zero, in [0, 1]. On a CPU, ``p`` is rounded to a multiple of 1/65536; a ``p`` that
            would become 0 or 1 stays exact. The other entries are multiplied by ``1 / (1 - p)`` with the rounded
            ``p``, so that the mean is kept.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> dropout(torch.ones(6), 0.5)
        tensor([0., 0., 2., 0., 0., 0.])
    """
    if x.device.type == "cpu" and values_known(x):
        return x * dropout_noise(x, p) if p > 0 else x
    return F.dropout(x, p)


def dropout_noise(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Dropout factors of the shape of ``like``: 0 with probability ``p``, else ``1 / (1 - p)``; see :func:`dropout`."""
    dropped = round(p * _LEVELS)
    noise = torch.empty_like(like, requires_grad=False)
    if like.device.type != "cpu" or dropped in (0, _LEVELS):
        noise.bernoulli_(1 - p, generator=generator)
        return noise.div_(1 - p) if p < 1 else noise
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    levels = draws.view(torch.int16)[: like.numel()].view(like.shape)
    # The comparison writes numbers at once: a bool tensor and its conversion would take three times as long.
    torch.ge(levels, dropped - _LEVELS // 2, out=noise)
    return noise.mul_(_LEVELS / (_LEVELS - dropped))
