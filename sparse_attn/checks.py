"""Checks of arguments; the dtypes of computation and result; a view of tensors with one value per row."""

from __future__ import annotations

import itertools
import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from sparse_attn.versions import autocast_enabled

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_floating(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is a tensor of one of the four supported floating dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must have a floating dtype (float16, bfloat16, float32, float64), got {x.dtype}")


def check_scores(x: Tensor, dim: int, name: str = "x") -> None:
    """Raise unless ``x`` is a floating tensor that has the dimension ``dim``."""
    check_floating(x, name)
    if type(dim) is not int and (isinstance(dim, bool) or not isinstance(dim, Integral)):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"dim must be in [{-rank}, {rank - 1}] for {name} of shape {tuple(x.shape)}, got {dim}")


def check_alpha(alpha: float | Tensor, name: str = "alpha") -> None:
    """Raise unless every α lies in the open interval ``(0, inf)``."""
    check_number_or_tensor(alpha, name)
    check_interval(alpha, name, above=0.0, below=math.inf)


def check_number_or_tensor(value: float | Tensor, name: str) -> None:
    """Raise unless ``value`` is a real number or a floating tensor."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating tensor, got a tensor of {value.dtype}")
    elif type(value) is not float and (isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat))):
        raise TypeError(f"{name} must be a number or a floating tensor, got {type(value).__name__}")


def check_interval(value: float | Tensor, name: str, *, above: float, below: float, closed: bool = False) -> None:
    """Raise unless ``above < value < below``, or ``above < value <= below`` when the interval is closed."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return
        least, most = (bound.item() for bound in value.detach().aminmax())
        if least > above and (most <= below if closed else most < below):  # false for NaN
            return
        fits = (value > above) & ((value <= below) if closed else (value < below))
        got = f"{value.detach()[~fits].flatten()[0].item():g}"
    elif value > above and (value <= below if closed else value < below):
        return
    else:
        got = f"{value}"
    raise ValueError(f"{name} must be in ({above:g}, {below:g}{']' if closed else ')'}, got {got}")


def check_row_parameter(value: Tensor, x: Tensor, dim: int, name: str) -> None:
    """Raise unless a tensor ``value`` is floating, has size 1 along ``dim``, and broadcasts against ``x``.

    The tensor must also be on the device of ``x``, unless it has no dimension. If a view of a one-dimensional tensor
    fits, the message shows the view.
    """
    check_number_or_tensor(value, name)
    if value.device != x.device and value.dim():
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    dim = dim % max(x.dim(), 1)
    rows = [1 if axis == dim else size for axis, size in enumerate(x.shape)]
    aligned = [1] * (x.dim() - value.dim()) + list(value.shape)
    if len(aligned) == len(rows) and all(got == 1 or got == size for got, size in zip(aligned, rows, strict=True)):
        return
    message = (
        f"{name} must broadcast against x of shape {tuple(x.shape)} with size 1 along dim {dim}, "
        f"got shape {tuple(value.shape)}"
    )
    axes = [axis for axis, size in enumerate(rows) if size == value.numel()]
    if value.dim() == 1:
        for axis in axes:
            view = ", ".join(["-1"] + ["1"] * (x.dim() - axis - 1))
            message += f"; for one {name} per entry of dim {axis} use {name}.view({view})"
    raise ValueError(message)


def check_k(k: int, size: int | None = None) -> None:
    """Raise unless ``k`` is an int as in :func:`is_int`, at least 1, and at most ``size`` if ``size`` is given."""
    if not is_int(k):
        raise TypeError(f"k must be an int, got {described_type(k)}")
    if k < 1 or (size is not None and k > size):
        # The text is built only when an error is raised: formatting a length makes it a constant under torch.compile.
        upper = "" if size is None else f" and at most {size}, the size of dim"
        raise ValueError(f"k must be at least 1{upper}, got {k}")


def is_int(value: object) -> bool:
    """Whether ``value`` is an int of Python or NumPy, a traced int, or an integer tensor with one entry; not a bool."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype in _INTEGERS
    return isinstance(value, (int, Integral, torch.SymInt)) and not isinstance(value, bool)


def described_type(value: object) -> str:
    """The type of a value for an error; of a tensor also the dtype, and the shape if there is not exactly one entry."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"Tensor of {value.dtype}" + ("" if value.numel() == 1 else f" and shape {tuple(value.shape)}")


def check_int(value: int, name: str) -> None:
    """Raise unless ``value`` is an int, of Python or of NumPy."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_number(value: float, name: str) -> None:
    """Raise unless ``value`` is a real number."""
    if type(value) is float:  # the usual case: the isinstance check below takes a microsecond
        return
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_scale(scale: float | None) -> None:
    """Raise unless the factor of attention scores is a finite number or None.

    Tensors are refused, since they would get no gradient.
    """
    # Under torch.jit.trace sizes are tensors, and so is a scale that is computed from a size.
    if scale is None or (torch._C._is_tracing() and isinstance(scale, Tensor)):
        return
    check_number(scale, "scale")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")


def check_bool(value: bool, name: str) -> None:
    """Raise unless ``value`` is True or False."""
    # `torch.onnx.export(dynamo=False)` passes default arguments as tensors.
    if isinstance(value, bool) or (torch._C._is_tracing() and isinstance(value, Tensor)):
        return
    if str(getattr(value, "dtype", "")) != "bool" or getattr(value, "shape", None) != ():  # not a bool of NumPy
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_flag(value: object, name: str) -> None:
    """Raise if a flag of torch's own layer is a string or a tensor with more than one entry.

    Torch takes the truth of any object. So ``"False"`` from a configuration would count as True, and a mask in the
    place of a flag would raise an error that names neither the mask nor the flag.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    if isinstance(value, Tensor) and value.dim():
        raise TypeError(f"{name} must be True or False, got a tensor of shape {tuple(value.shape)}")


def check_module(model: nn.Module, name: str = "model") -> None:
    """Raise unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def check_filter(filter_fn: object) -> None:
    """Raise unless ``filter_fn`` is a function or None."""
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of name and module, or None, got {filter_fn!r}")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Raise unless ``dropout`` is a probability."""
    check_number(dropout, name)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {dropout}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, otherwise that of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def result_dtype(x: Tensor) -> torch.dtype:
    """The input's dtype; under autocast the dtype that ``torch.softmax`` returns, which differs between devices."""
    if not autocast_enabled(x.device):
        return x.dtype
    return torch.softmax(x.new_zeros(1), -1).dtype


def rows_last(value: Tensor, x: Tensor, dim: int) -> Tensor:
    """A tensor with size 1 along ``dim`` of ``x``, as a view that broadcasts against ``x.movedim(dim, -1)``."""
    if not x.dim() or (value.dim() and dim in (-1, x.dim() - 1)):  # broadcasting adds leading dimensions
        return value
    return value.view([1] * (x.dim() - value.dim()) + list(value.shape)).movedim(dim % x.dim(), x.dim() - 1)


def check_starts(starts: Tensor, total: int, name: str) -> None:
    """Raise unless the starts of packed sequences begin with 0, never decrease and end with the total length."""
    values = starts.tolist()
    if not values or values[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {values[0] if values else 'no entries'}")
    for before, after in itertools.pairwise(values):
        if after < before:
            raise ValueError(f"{name} must not decrease, got {after} after {before}")
    if values[-1] != total:
        raise ValueError(f"{name} must end with the total length {total}, got {values[-1]}")
