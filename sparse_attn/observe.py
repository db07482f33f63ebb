"""Who looks at attention weights while a model runs.

Attention functions that are called by models of others (`integrations`) have no hook of their own where weights
could be read. They ask `observed()` whether to make weights at all, and `tell` them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Observer = Callable[[nn.Module, Tensor], None]
_observers: list[Observer] = []


def observed() -> bool:
    """Whether anybody looks."""
    return bool(_observers)


def tell(module: nn.Module, weights: Tensor) -> None:
    """Show the weights (N, H, L, S) that ``module`` attends with to everybody who looks."""
    for observer in _observers:
        observer(module, weights)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Have ``observer`` called by every :func:`tell` while the context is open."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
