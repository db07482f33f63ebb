"""The functions of this folder that other modules call, except ``plan``. Importing this module imports Triton."""

from sparse_attn.kernels.triton.attention.backward import backward
from sparse_attn.kernels.triton.attention.dropout import multipliers
from sparse_attn.kernels.triton.attention.forward import forward

__all__ = ["backward", "forward", "multipliers"]
