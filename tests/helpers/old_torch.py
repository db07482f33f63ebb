"""Skips tests that need a newer torch; `docs/versions.md` lists the limits of old versions."""

from __future__ import annotations

import pytest

from sparse_attn import versions


def since_torch(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip a test if torch is older than this version; the reason says what an older torch does or lacks."""
    return pytest.mark.skipif(
        (major, minor) > versions.TORCH, reason=f"needs torch {major}.{minor} or newer: before, {reason}"
    )
