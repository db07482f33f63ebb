"""Schedules of the learning rate, as factors of the configured value."""

from __future__ import annotations

import math

from .tokenizer import check_choice

SCHEDULES = ("linear", "inverse_sqrt", "noam", "cosine")


def check_schedule(name: str, warmup: float) -> None:
    """Refuses an unknown schedule, or a warm-up that is not a share of the training.

    Raises:
        ValueError: If a value is not allowed.
    """
    check_choice("schedule", name, SCHEDULES)
    if not 0 <= warmup < 1:
        raise ValueError(f"schedule.warmup must be a share of the training in [0, 1), got {warmup}")


def rate_factor(step: int, warmup: int, total: int, *, schedule: str = "linear", dim: int = 1) -> float:
    r"""The factor of the learning rate at a step, counted from 0.

    With :math:`s = \text{step} + 1`, all schedules rise linearly for :math:`w` steps, at least one. The schedules other
    than ``noam`` rise to 1. Afterwards, ``linear`` decreases linearly to zero at ``total``, ``cosine`` decreases to
    zero at ``total`` as half a cosine wave, and ``inverse_sqrt`` decreases as :math:`\sqrt{w / s}`. ``noam`` is

    .. math:: d^{-1/2} \min(s^{-1/2}, s \, w^{-3/2})

    whose highest value is :math:`(d w)^{-1/2}`. With this schedule, ``learning_rate`` is therefore a factor of about 1.

    Args:
        step: Number of finished updates.
        warmup: Number :math:`w` of updates in which the rate rises.
        total: Number of updates of the whole training; used by ``linear`` and ``cosine``.
        schedule: ``"linear"``, ``"inverse_sqrt"``, ``"noam"`` or ``"cosine"``.
        dim: Size :math:`d` of the model, for ``noam``.

    Example:
        >>> [rate_factor(step, 2, 6) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        >>> [round(rate_factor(step, 2, 6, schedule="cosine"), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
        >>> [round(rate_factor(step, 2, 6, schedule="inverse_sqrt"), 2) for step in range(4)]
        [0.5, 1.0, 0.82, 0.71]

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", equation 3 (noam); Loshchilov & Hutter 2017, "SGDR" (cosine).
    """
    done, warmup = step + 1, max(1, warmup)
    rise = min(1.0, done / warmup)
    if schedule == "inverse_sqrt":
        return min(rise, math.sqrt(warmup / done))
    if schedule == "noam":
        return min(rise, math.sqrt(warmup / done)) / math.sqrt(dim * warmup)
    left = max(0.0, min(1.0, (total - step) / max(1, total - warmup)))
    if schedule == "cosine":
        return min(rise, 0.5 - 0.5 * math.cos(math.pi * left))
    return min(rise, left)
