"""Modules that hold an α: a number, a buffer, or a learnt parameter that ``alpha_range`` keeps in a range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_alpha, check_bool
from sparse_attn.nn.alpha_range import MARGIN, bounded_alpha, check_alpha_range, check_inside

if TYPE_CHECKING:
    from typing_extensions import Self

# A loaded α may lie past a bound by this share of the range if the checkpoint does not record the range.
_CARRIED = 0.5
# The range that a checkpoint records for a fixed α.
_ANY = (0.0, math.inf)
_HALF = (torch.float16, torch.bfloat16)


def value_for(name: str, value: Any, argument: str) -> Any:
    """An argument's value for the layer ``name``: its entry in a mapping of layer names, or the value itself."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"{argument} must have a value for the layer {name!r}, got values for {', '.join(value) or 'none'}"
        )
    return value[name]


def initial_alpha(
    alpha_init: float | Sequence[float] | Tensor, alpha_range: tuple[float, float] | None, num_heads: int
) -> Tensor:
    """``(num_heads,)`` initial values in float64, checked against ``(0, inf)`` and against the range, if any."""
    alpha = one_or_per_head(alpha_init, "alpha_init")
    if tuple(alpha.shape) not in ((), (num_heads,)):
        raise ValueError(f"alpha_init must be a number or one per head ({num_heads},), got shape {tuple(alpha.shape)}")
    check_alpha(alpha, "alpha_init")
    if alpha_range is not None:
        check_inside(alpha, alpha_range, "alpha_init")
    return alpha.expand(num_heads).clone()


def one_or_per_head(alpha: float | Sequence[float] | Tensor, name: str) -> Tensor:
    """A number, a sequence or a tensor of numbers as a float64 tensor on the CPU, without a graph."""
    try:
        given = float(alpha) if isinstance(alpha, Fraction) else alpha
        if torch.as_tensor(given).dtype != torch.bool:
            return torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number or one per head, got {alpha!r}")


def whole(alpha: Tensor) -> Tensor:
    """The full tensor if ``alpha`` is sharded, else ``alpha``. Every process must call this. Differentiable."""
    return alpha.full_tensor() if hasattr(alpha, "full_tensor") else alpha


def fill(raw_alpha: Tensor, value: Tensor) -> None:
    """Write a value into ``raw_alpha`` in place. If the tensor is sharded, every process has to call this."""
    value = value.to(raw_alpha.device, raw_alpha.dtype).expand(raw_alpha.shape).contiguous()
    if hasattr(raw_alpha, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = raw_alpha
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    with torch.no_grad():
        raw_alpha.copy_(value)


def _to_float32(raw_alpha: Tensor, value: Tensor, grad: Tensor | None) -> None:
    """Give a parameter or buffer this value and gradient in float32. The tensor stays the same object."""
    raw_alpha.grad = None  # torch refuses a gradient of another dtype
    raw_alpha.data = value.to(raw_alpha.device, torch.float32)
    raw_alpha.grad = None if grad is None else grad.to(raw_alpha.device, torch.float32)


class WideAlpha(nn.Module):
    """A module with an α, learnt or fixed, that stays in float32 or wider even after ``.to`` and ``.half``.

    In bfloat16 the distance between two numbers at 1.5 is 0.008: an optimizer step below 0.004 would not change α.

    Attributes:
        alpha_range: The closed interval of a learnt α.
        raw_alpha: A parameter if α is learnt, a buffer if α is a fixed tensor, None if α is a number. A number
            becomes a buffer, and part of the state dict, when another α is set or loaded.
    """

    alpha_range: tuple[float, float]
    raw_alpha: Tensor | None

    @property
    def alpha(self) -> float | Tensor:
        """The current α."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.raw_alpha is None:
            return super()._apply(fn, recurse)
        before, grad = self.raw_alpha.detach(), self.raw_alpha.grad
        grad = None if grad is None else grad.detach()  # torch converts the gradient in place
        super()._apply(fn, recurse)
        if self.raw_alpha.dtype in _HALF:
            _to_float32(self.raw_alpha, before, grad)
        return self

    def _has_range(self, alpha_range: tuple[float, float]) -> bool:
        return has_learnt_alpha(self) and tuple(alpha_range) == self.alpha_range

    def alpha_as_tensor(self) -> Tensor:
        """``raw_alpha``. If α is a number, this method first turns it into a buffer."""
        if self.raw_alpha is None:
            alpha = torch.as_tensor(self.alpha)
            del self.raw_alpha
            self.register_buffer("raw_alpha", alpha.to(torch.promote_types(alpha.dtype, torch.float32)))
        return cast(Tensor, self.raw_alpha)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The range is stored in the metadata of the state dict, beside torch's version number of the module. Other
        # checkpoint formats may drop this metadata.
        noted = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if noted is not None and self.raw_alpha is not None:
            noted["alpha_range"] = self.alpha_range if has_learnt_alpha(self) else _ANY

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, was_number, errors = prefix + "raw_alpha", self.raw_alpha is None, len(error_msgs)
        if key not in state_dict:
            default = self._alpha_without_checkpoint()
            if default is not None:
                state_dict[key] = default
        elif isinstance(state_dict[key], Tensor):
            current, saved_range = self.alpha_as_tensor().detach(), local_metadata.get("alpha_range")
            if saved_range not in (None, _ANY) and not self._has_range(saved_range):
                # A parameter past a bound stands for α on the bound. A module with another range, or with a fixed α,
                # would use the parameter's own value as α, so this value is clamped to the saved range.
                raw = state_dict[key].detach()
                state_dict[key] = torch.where(raw.isfinite(), raw.clamp(*saved_range), raw)
            error = self._misfit(key, state_dict[key], saved_range)
            if error is not None:
                error_msgs.append(error)
                state_dict[key] = current.clone()  # keeps the current α
            elif state_dict[key].dtype in _HALF:
                state_dict[key] = state_dict[key].detach().float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if was_number and len(error_msgs) > errors:
            self.raw_alpha = None  # a refused load adds no buffer

    def _alpha_without_checkpoint(self) -> Tensor | None:
        """The α to use if a state dict has none. If the result is None, the key of a tensor α counts as missing."""
        return None

    def _misfit(self, key: str, loaded: Tensor, saved_range: tuple[float, float] | None) -> str | None:
        """Why a loaded α does not fit this module, or None."""
        if loaded.is_meta:
            return None
        alpha = (loaded.to_local() if hasattr(loaded, "to_local") else loaded).detach().double().flatten()
        if not has_learnt_alpha(self):
            wrong, allowed = ~((alpha > 0) & alpha.isfinite()), "in (0, inf)"
        else:
            low, high = self.alpha_range
            # A parameter learnt in this very range may lie anywhere: momentum and weight decay move it past a bound.
            own = saved_range is not None and self._has_range(saved_range)
            slack = math.inf if own else (_CARRIED if saved_range is None else MARGIN) * (high - low)
            wrong = ~((alpha >= low - slack) & (alpha <= high + slack) & alpha.isfinite())
            allowed = f"in the layer's alpha_range [{low:g}, {high:g}]"
        if not bool(wrong.any()):
            return None
        trained = "" if saved_range in (None, _ANY) else f", learnt in [{saved_range[0]:g}, {saved_range[1]:g}]"
        return f"{key} must be {allowed}, got {alpha[wrong][0].item():g}{trained}"


def has_learnt_alpha(module: nn.Module) -> bool:
    """Whether the α of a module is a parameter, frozen or not; False for a module without α."""
    # `_parameters` decides, not the type: torch.func.functional_call replaces parameters by plain tensors.
    return isinstance(module, WideAlpha) and module._parameters.get("raw_alpha") is not None


class HoldsAlpha(WideAlpha):
    """A module with one α argument: a number, a buffer, or a learnt parameter inside ``alpha_range``.

    Args:
        alpha: A number or a floating tensor. A parameter is learnt, any other tensor is copied into a buffer. A
            parameter in half precision becomes float32 in place, so that an optimizer still has the same parameter.
        learn_alpha: Learn α, also if it is given as a number or a plain tensor.
        alpha_range: The closed interval that a learnt α stays in.
    """

    def __init__(self, alpha: float | Tensor, *, learn_alpha: bool, alpha_range: tuple[float, float]) -> None:
        super().__init__()
        check_alpha(alpha)
        check_bool(learn_alpha, "learn_alpha")
        self.alpha_range = check_alpha_range(alpha_range)
        self.learn_alpha = learn_alpha or isinstance(alpha, nn.Parameter)
        if self.learn_alpha:
            number = alpha if isinstance(alpha, Tensor) else torch.tensor(float(alpha))  # a fraction becomes a float
            check_inside(number, self.alpha_range, "alpha")
            alpha = alpha if isinstance(alpha, nn.Parameter) else nn.Parameter(number.detach().clone())
        if isinstance(alpha, Tensor):
            hold(self, "raw_alpha", alpha)
            if alpha.dtype in _HALF:
                held = self.alpha_as_tensor()
                _to_float32(held, held.detach(), held.grad)
        else:
            self.raw_alpha, self._number = None, float(alpha)

    @property
    def alpha(self) -> float | Tensor:
        """The current α."""
        if self.raw_alpha is None:
            return self._number
        return bounded_alpha(self.raw_alpha, self.alpha_range) if self.learn_alpha else self.raw_alpha

    def extra_repr(self) -> str:
        """The α arguments; a tensor α is shown by its values."""
        alpha = self._number if self.raw_alpha is None else shown(self.raw_alpha)
        return f"alpha={alpha}" + (f", learn_alpha=True, alpha_range={self.alpha_range}" if self.learn_alpha else "")


def hold(module: nn.Module, name: str, value: float | Tensor) -> None:
    """Set a number, register a parameter, or register a copy of any other tensor as a buffer.

    Raises:
        ValueError: ``value`` has a gradient and is not a parameter: a copy in a buffer would lose the gradient.
    """
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.requires_grad:
            argument = name.removeprefix("raw_")  # the argument `alpha` is held as `raw_alpha`
            raise ValueError(
                f"{argument} must be a number, a parameter or a tensor without gradient, got a tensor with gradient"
            )
        module.register_buffer(name, value.clone())
    else:
        setattr(module, name, value)


def shown(value: float | Tensor) -> object:
    """A number, or the values of a tensor (its shape if it is on the meta device), for ``extra_repr``."""
    if isinstance(value, Tensor):
        return f"<{tuple(value.shape)} on meta>" if value.is_meta else value.tolist()
    return value


class HeadAlpha(WideAlpha):
    """One learnt α per head for an attention module of another library, which holds this module as ``sparse_alpha``.

    Args:
        num_heads: Number of heads H.
        alpha_init: The initial α: a number, or one per head.
        alpha_range: The closed interval that α stays in.
        device: The device of the parameter, which is float32.

    Attributes:
        raw_alpha: (H,) the parameter.
        alpha: (H,) the current α, differentiable.

    Example:
        >>> HeadAlpha(2, alpha_init=[1.25, 1.75]).alpha
        tensor([1.2500, 1.7500], grad_fn=<_BoundedBackward>)
    """

    raw_alpha: nn.Parameter

    def __init__(
        self,
        num_heads: int,
        *,
        alpha_init: float | Sequence[float] | Tensor = 1.5,
        alpha_range: tuple[float, float] = (1.0, 2.0),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.alpha_range = check_alpha_range(alpha_range)
        alpha = initial_alpha(alpha_init, self.alpha_range, num_heads)
        self.raw_alpha = nn.Parameter(alpha.to(device, torch.float32))

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.raw_alpha)

    @property
    def alpha(self) -> Tensor:
        """(H,) the current α."""
        return bounded_alpha(self.raw_alpha, self.alpha_range)

    def extra_repr(self) -> str:
        """The current values and their range."""
        return f"alpha={shown(self.alpha)}, alpha_range={self.alpha_range}"


def head_alpha(module: nn.Module) -> HeadAlpha | None:
    """The learnt α of another library's attention module, or None."""
    # The type is not checked: PEFT's `modules_to_save` replaces a HeadAlpha by a wrapper that passes attributes on.
    return getattr(module, "sparse_alpha", None)
