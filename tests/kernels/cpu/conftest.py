"""Tests with an argument ``variant`` run with each variant of the C kernels that this processor supports."""

from __future__ import annotations

import pytest

from sparse_attn.kernels.cpu import rows


@pytest.fixture(params=rows.variants() or ["none"])
def variant(request) -> str:
    return request.param
