"""Multi-head attention with one learnt α per head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_bool
from sparse_attn.masks import Window
from sparse_attn.nn.alpha import WideAlpha, fill, initial_alpha
from sparse_attn.nn.alpha_range import bounded_alpha, check_alpha_range
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.positions import Positions
from sparse_attn.ops.attention import ScoreMapping, entmax_mapping

if TYPE_CHECKING:
    from typing_extensions import Self


class AdaptiveSparseMultiheadAttention(WideAlpha, SparseMultiheadAttention):
    """``nn.MultiheadAttention`` with α-entmax in place of softmax and one learnt α per head.

    ::

        query ─ linear ─┐
        key ─── linear ─┴─ scores (N, H, L, S) ─ α-entmax, α (H,) ─ weights ─┐
        value ─ linear ──────────────────────────────────────────────────────┴─ heads ─ out_proj

    Args:
        embed_dim: Embedding size E. This and all arguments up to ``dtype`` are those of ``nn.MultiheadAttention``.
        num_heads: Number of heads H, a divisor of ``embed_dim``.
        dropout: Probability that a weight is dropped in training.
        bias: Biases on the projections.
        add_bias_kv: A learnt extra key and value.
        add_zero_attn: An extra key and value of zeros.
        kdim: Size of the keys; ``embed_dim`` by default.
        vdim: Size of the values; ``embed_dim`` by default.
        batch_first: (N, L, E) instead of (L, N, E).
        device: Device of the parameters.
        dtype: Dtype of the parameters. α stays in float32 or wider, also after ``.to`` and ``.half``: in bfloat16
            optimizer steps would be too small to change α.
        alpha_init: The initial α: a number, or one per head.
        alpha_range: The closed interval that a learnt α stays in; α = 1 is softmax, 2 is sparsemax.
        learn_alpha: Whether α is a parameter. A fixed α may have any value in ``(0, inf)``; the state dict is that of
            ``nn.MultiheadAttention`` unless :func:`sparse_attn.optim.set_alpha` was called.
        num_kv_heads: Number of heads of keys and values, a divisor of ``num_heads``; query heads share them.
        window: (left, right): how many keys a query sees before and after its own position; one int for both sides.
        qk_norm: RMSNorm on the queries and keys of every head.
        positions: ``RotaryPositions``, ``ALiBi``, ``NAPE`` or another subclass of ``Positions``.
        length_scaling: Scale queries by a learnt function of the number of visible keys. This argument and the four
            before are described in :class:`SparseMultiheadAttention`.

    Attributes:
        alpha: (H,) the current α per head, differentiable when learnt.
        raw_alpha: (H,) the parameter behind ``alpha``. A state dict without this parameter (a dense checkpoint) loads
            and keeps the current α. Give the parameter no weight decay. Weight decay pulls it towards 0, below its
            range: α decreases to its lower bound and stays there, unless the gradient of the loss is larger.
            :func:`sparse_attn.optim.alpha_param_groups` makes parameter groups without weight decay. If α is not
            learnt: None, or a buffer after a call of :func:`sparse_attn.optim.set_alpha`.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of ``num_heads``; ``alpha_init`` is outside ``alpha_range`` or,
            without ``learn_alpha``, outside ``(0, inf)``; or ``alpha_range`` is not ``0 < low < high < inf``.

    Shape:
        As in ``nn.MultiheadAttention``; see :meth:`forward`.

    Example:
        >>> layer = AdaptiveSparseMultiheadAttention(16, num_heads=2, batch_first=True)
        >>> x = torch.randn(3, 5, 16)
        >>> output, weights = layer(x, x, x)
        >>> output.shape, weights.shape, layer.alpha.detach()
        (torch.Size([3, 5, 16]), torch.Size([3, 5, 5]), tensor([1.5000, 1.5000]))

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers".
    """

    raw_alpha: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        alpha_init: float | Sequence[float] | Tensor = 1.5,
        alpha_range: tuple[float, float] = (1.0, 2.0),
        learn_alpha: bool = True,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        qk_norm: bool = False,
        positions: Positions | None = None,
        length_scaling: bool = False,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
            num_kv_heads=num_kv_heads,
            window=window,
            qk_norm=qk_norm,
            positions=positions,
            length_scaling=length_scaling,
        )
        check_bool(learn_alpha, "learn_alpha")
        self.alpha_range = check_alpha_range(alpha_range)
        self.learn_alpha = learn_alpha
        alpha = initial_alpha(alpha_init, self.alpha_range if learn_alpha else None, num_heads)
        self.alpha_init = tuple(alpha.tolist())
        if learn_alpha:
            self.raw_alpha = nn.Parameter(self._initial_raw_alpha().to(self.out_proj.weight.device))
        else:
            self.register_parameter("raw_alpha", None)

    def _initial_raw_alpha(self) -> Tensor:
        weight = next(self.parameters())  # not the weight of out_proj: a user's out_proj may have none
        return torch.tensor(self.alpha_init, dtype=torch.promote_types(weight.dtype, torch.float32), device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        had_no_values = self.raw_alpha is not None and self.raw_alpha.is_meta
        super()._apply(fn, recurse)
        if had_no_values and self.raw_alpha is not None and not self.raw_alpha.is_meta:
            # A module leaves the meta device only by `to_empty`, which does not initialise memory. A checkpoint without
            # α fills all other parameters, so α is initialised here.
            fill(self.raw_alpha, self._initial_raw_alpha())
        return self

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        raw_alpha = getattr(self, "raw_alpha", None)  # torch's constructor calls this method before α exists
        if raw_alpha is not None:
            fill(raw_alpha, self._initial_raw_alpha())

    @property
    def alpha(self) -> Tensor:
        """(H,) the current α per head."""
        if self.raw_alpha is not None:
            return bounded_alpha(self.raw_alpha, self.alpha_range) if self.learn_alpha else self.raw_alpha
        return self._initial_raw_alpha().to(next(self.parameters()).device)

    def mapping(self) -> ScoreMapping:
        """α-entmax over the keys. If all heads have the same fixed α, it is passed as a number, which is faster."""
        if self.raw_alpha is None and len(set(self.alpha_init)) == 1:
            return entmax_mapping(self.alpha_init[0], self.num_heads)
        return entmax_mapping(self.alpha, self.num_heads)

    def extra_repr(self) -> str:
        """The α arguments as given, and those of the base class."""
        inits = set(self.alpha_init)
        init = self.alpha_init[0] if len(inits) == 1 else self.alpha_init
        own = f"alpha_init={init}, alpha_range={self.alpha_range}, learn_alpha={self.learn_alpha}"
        return ", ".join(filter(None, (own, super().extra_repr())))

    def _alpha_without_checkpoint(self) -> Tensor | None:
        if self.raw_alpha is None:
            return None
        return self._initial_raw_alpha() if self.raw_alpha.is_meta else self.raw_alpha.detach()
