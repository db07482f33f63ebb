"""Tests with an argument ``variant`` run with each variant of the row kernels that this processor supports."""

from __future__ import annotations

import pytest

from sparse_attn.kernels.cpu import rows

ATTENTION_ONLY = ("avx512_bf16", "avx512_amx")  # they differ from avx512 in attention only


@pytest.fixture(params=[name for name in rows.variants() if name not in ATTENTION_ONLY] or ["none"])
def variant(request) -> str:
    return request.param
