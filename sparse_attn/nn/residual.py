"""The base class of the encoder and decoder layers, with residual branches, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from sparse_attn.checks import check_bool, check_dropout, check_floating, check_int, check_number
from sparse_attn.masks import ScoreShape, check_multihead_masks
from sparse_attn.nn.cache import KVCache
from sparse_attn.nn.dropout import Dropout
from sparse_attn.nn.multihead import SparseMultiheadAttention

Activation = Callable[[Tensor], Tensor]
NormKind = Literal["layer", "rms"]


class ResidualLayer(nn.Module):
    """Base class of the layers: the feed-forward block, and residual branches with a norm before or after each."""

    self_attn: nn.MultiheadAttention

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int | None,
        dropout: float,
        activation: Activation,
        norm_first: bool,
        factory: Any,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_bool(norm_first, "norm_first")
        check_int(d_model, "d_model")
        width = 4 * d_model if dim_feedforward is None else dim_feedforward
        for name, size in (("d_model", d_model), ("dim_feedforward", width)):
            check_int(size, name)
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not callable(activation):
            raise TypeError(f"activation must be a function of a tensor such as F.gelu, got {activation!r}")
        self.d_model = d_model
        self.linear1 = nn.Linear(d_model, width, **factory)
        self.linear2 = nn.Linear(width, d_model, **factory)
        self.dropout = Dropout(dropout)
        self.activation = activation
        self.norm_first = norm_first

    def _check_input(self, x: Tensor, name: str) -> None:
        check_floating(x, name)
        if x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got a nested tensor")
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            form = batched_form(self.self_attn, "L")
            raise ValueError(f"{name} must be {form} or (L, E) with E = {self.d_model}, got shape {tuple(x.shape)}")

    def _add(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` plus the output of a branch, with the norm before or after."""
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def make_norm(kind: str, size: int, eps: float, factory: Any) -> nn.Module:
    """The norm of a branch: "layer" for LayerNorm, "rms" for RMSNorm."""
    check_number(eps, "layer_norm_eps")
    if kind == "layer":
        return nn.LayerNorm(size, eps, **factory)
    if kind == "rms":
        return nn.RMSNorm(size, eps, device=factory["device"], dtype=factory["dtype"])
    raise ValueError(f"norm must be one of layer, rms, got {kind!r}")


def check_attention(attention: object, name: str = "attention") -> None:
    """Raise unless ``attention`` can be called to make an attention layer."""
    if not callable(attention) or isinstance(attention, nn.Module):
        got = type(attention).__name__
        raise TypeError(f"{name} must be a class or a function that makes an attention layer, got {got}")


def check_masks(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    cache: KVCache | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    names: tuple[str, str],
) -> None:
    """Raise unless the masks fit.

    Errors name the argument of this layer, such as ``src_mask``; an error of the attention would say ``attn_mask``.
    """
    if (mask is None and key_padding_mask is None) or not isinstance(attention, SparseMultiheadAttention):
        return
    batched = query.dim() == 3
    length = 1 if batched and attention.batch_first else 0  # the axis of the length
    keys = key.shape[length]
    if isinstance(cache, KVCache):
        keys = len(cache) if cache.complete else len(cache) + keys
    check_multihead_masks(
        mask,
        key_padding_mask,
        ScoreShape(query.shape[1 - length] if batched else 1, attention.num_heads, query.shape[length], keys),
        batched=batched,
        names=names,
    )


def batched_form(attention: nn.MultiheadAttention, length: str) -> str:
    """The shape of batched input, for errors: (N, L, E), or (L, N, E) without ``batch_first``."""
    return f"(N, {length}, E)" if getattr(attention, "batch_first", True) else f"({length}, N, E)"


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None: a plain ``nn.MultiheadAttention`` would not accept the keywords."""
    return {name: value for name, value in arguments.items() if value is not None}
