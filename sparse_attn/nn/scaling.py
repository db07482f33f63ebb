"""Scaling of scores by the number of keys, so that attention can stay as sparse on long inputs as on short ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn.checks import check_int


class LengthScaling(nn.Module):
    """A factor for queries: ``1 + β (log n) ** γ``, where n is the number of keys that a query sees, at least 2.

    ``β = softplus(w_β · x + b_β)`` and ``γ = 2 tanh(w_γ · x + b_γ)`` are learnt per head from the layer's input x.
    w_β, w_γ and b_γ start at zero, and b_β starts at the value that gives β = 0.05: the factor of a scaled head starts
    at 1.05. A random start gives factors of up to 20, from which training often does not recover.

    Args:
        embed_dim: Size E of the input.
        num_heads: H.
        unscaled_heads: The number of heads, counted from the first, whose factor is always one.
        device: The device of the parameters.
        dtype: The dtype of the parameters.

    Raises:
        TypeError: A size or number is not an int.
        ValueError: ``embed_dim`` is below 1, or ``unscaled_heads`` is negative or leaves no head to scale.

    Shape:
        ``x`` (N, L, E) and ``visible`` broadcastable to (N, H, L) -> (N, H, L, 1).

    Example:
        >>> LengthScaling(16, num_heads=3, unscaled_heads=1)(torch.randn(2, 5, 16), torch.tensor(7))[0, :, 0, 0]
        tensor([1.0000, 1.0500, 1.0500], grad_fn=<SelectBackward0>)

    Reference:
        Vasylenko, Pitorro, Martins & Treviso 2025, "Long-Context Generalization with Sparse Attention"; the
        initial values differ.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        unscaled_heads: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = {"embed_dim": embed_dim, "num_heads": num_heads, "unscaled_heads": unscaled_heads}
        for name, number in numbers.items():
            check_int(number, name)
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        if not 0 <= unscaled_heads < num_heads:
            raise ValueError(f"unscaled_heads must be in [0, {num_heads}), the number of heads, got {unscaled_heads}")
        self.unscaled_heads = unscaled_heads
        scaled = num_heads - unscaled_heads
        factory: Any = {"device": device, "dtype": dtype}
        # Weights have one dimension: nn.Transformer initialises every parameter with more than one dimension, and would
        # overwrite the initial values.
        self.beta_weight = nn.Parameter(torch.empty(scaled * embed_dim, **factory))
        self.beta_bias = nn.Parameter(torch.empty(scaled, **factory))
        self.gamma_weight = nn.Parameter(torch.empty(scaled * embed_dim, **factory))
        self.gamma_bias = nn.Parameter(torch.empty(scaled, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values, with which every factor is near one."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(self.beta_bias, math.log(math.expm1(0.05)))  # the inverse of softplus

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """The factor of each head and query."""
        wide = torch.promote_types(x.dtype, torch.float32)
        beta, gamma = (
            F.linear(x, weight.view(-1, x.shape[-1]), bias).movedim(-1, 1).to(wide)
            for weight, bias in ((self.beta_weight, self.beta_bias), (self.gamma_weight, self.gamma_bias))
        )
        # This is softplus. torch.compile computes wrong strides in the backward of F.softplus.
        beta, gamma = torch.logaddexp(beta, torch.zeros_like(beta)), 2 * gamma.tanh()
        visible = visible.to(wide)
        if visible.dim() > 1 and visible.shape[-2] > 1:
            visible = visible[..., self.unscaled_heads :, :]
        # A single key gets all the weight, whatever the factor is; log 1 = 0 has no negative powers.
        log_n = visible.clamp(min=2).log()
        factor = 1 + beta * log_n**gamma
        return F.pad(factor, (0, 0, self.unscaled_heads, 0), value=1.0).unsqueeze(-1)
