"""A decorator that runs a test with several backends, and skips backends that are not available."""

from __future__ import annotations

import pytest

from sparse_attn import backends


def each_backend(*names: str) -> pytest.MarkDecorator:
    """Run a test with each of these backends as its argument ``backend``; skip a backend that is not available."""
    states = backends()
    parameters = [
        pytest.param(name, marks=pytest.mark.skipif(states[name].startswith("not available"), reason=states[name]))
        for name in names
    ]
    return pytest.mark.parametrize("backend", parameters)
