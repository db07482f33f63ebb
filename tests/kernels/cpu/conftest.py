"""Tests with an argument ``variant`` run with each variant of the row kernels that this processor supports."""

from __future__ import annotations

import pytest

from sparse_attn.kernels.cpu import rows


# The variant avx512_bf16 differs from avx512 in attention only.
@pytest.fixture(params=[name for name in rows.variants() if name != "avx512_bf16"] or ["none"])
def variant(request) -> str:
    return request.param
