"""A switch for torch's fused inference path, which is set back at the end of the context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """Switch torch's fused inference path for attention and encoders on or off within the context."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
