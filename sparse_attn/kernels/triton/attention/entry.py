"""The functions of the fused kernels that the rest of the library calls. Importing this imports Triton."""

from sparse_attn.kernels.triton.attention.backward import backward
from sparse_attn.kernels.triton.attention.dropout import multipliers
from sparse_attn.kernels.triton.attention.forward import forward

__all__ = ["backward", "forward", "multipliers"]
