"""A parameter with all compiled variants of the C kernels, with which every test runs."""

from __future__ import annotations

import pytest

from sparse_attn.kernels.cpu import rows


@pytest.fixture(params=rows.variants() or ["none"])
def variant(request) -> str:
    return request.param
