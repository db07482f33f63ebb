"""What every operator asks of its arguments, and how a result finds its way back to the caller's dtype."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is a tensor of one of the four floating dtypes that are computed with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must have a floating dtype (float16, bfloat16, float32, float64), got {x.dtype}")


def check_scores(x: Tensor, dim: int) -> None:
    """Raise unless ``x`` is a floating tensor that has the dimension ``dim``."""
    check_floating(x, "x")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"dim must be in [{-rank}, {rank - 1}] for x of shape {tuple(x.shape)}, got {dim}")


def check_alpha(alpha: float | Tensor, name: str = "alpha") -> None:
    """Raise unless every α lies in the open interval ``(0, inf)``."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating tensor, got a tensor of {alpha.dtype}")
        wrong = ~((alpha > 0) & (alpha < math.inf))
        if bool(wrong.any()):
            raise ValueError(f"{name} must be in (0, inf), got {alpha.detach()[wrong].flatten()[0].item():g}")
    elif isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"{name} must be a number or a floating tensor, got {type(alpha).__name__}")
    elif not 0 < alpha < math.inf:
        raise ValueError(f"{name} must be in (0, inf), got {alpha}")


def check_alpha_shape(alpha: Tensor, x: Tensor, dim: int) -> None:
    """Raise unless a tensor ``alpha`` broadcasts against ``x`` with size 1 along ``dim``, showing the view to use."""
    dim = dim % max(x.dim(), 1)
    rows = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    aligned = [1] * (x.dim() - alpha.dim()) + list(alpha.shape)
    fits = len(aligned) == len(rows) and all(got in (1, size) for got, size in zip(aligned, rows, strict=True))
    if fits:
        return
    message = (
        f"alpha must broadcast against x of shape {tuple(x.shape)} with size 1 along dim {dim}, "
        f"got shape {tuple(alpha.shape)}"
    )
    axes = [axis for axis, size in enumerate(rows) if size == alpha.numel()]
    if alpha.dim() == 1:
        for axis in axes:
            view = ", ".join(["-1"] + ["1"] * (x.dim() - axis - 1))
            message += f"; for one alpha per entry of dim {axis} use alpha.view({view})"
    raise ValueError(message)


def check_k(k: int, size: int | None = None) -> None:
    """Raise unless ``k`` is an int of at least 1, and at most ``size`` when that is given."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    upper = "" if size is None else f" and at most {size}, the size of dim"
    if k < 1 or (size is not None and k > size):
        raise ValueError(f"k must be at least 1{upper}, got {k}")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Raise unless ``dropout`` is a probability."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"{name} must be a number, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {dropout}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def result_dtype(x: Tensor) -> torch.dtype:
    """The input's dtype; under autocast whatever ``torch.softmax`` returns there, which differs between devices."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.softmax(x.new_zeros(1), -1).dtype
