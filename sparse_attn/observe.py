"""Who looks at attention weights while a model runs.

Attention that has no hook where weights could be read (functions called by models of others, layers that return their
output alone) asks `observed()` whether to make weights at all, and `tell`s them. A block of one's own may do the same,
and `announce` itself, so that a model that has nothing else can be told from one without attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor, nn

Observer = Callable[[nn.Module, Tensor, Tensor | None, float | Tensor | None], None]
_observers: list[Observer] = []
_aside: list[int] = []  # threads in which nobody looks for now
_announced: list[Callable[[nn.Module], bool]] = []


def observed() -> bool:
    """Whether anybody looks."""
    return bool(_observers) and not (_aside and get_ident() in _aside)


def tell(
    module: nn.Module, weights: Tensor, visible: Tensor | None = None, alpha: float | Tensor | None = None
) -> None:
    """Show the weights that ``module`` attends with to everybody who looks.

    Args:
        module: The one that attends.
        weights: (N, H, L, S).
        visible: True where a query may see a key; broadcasts against ``weights``. None: everywhere.
        alpha: α that made the weights, a number or one per head; None: ``module.alpha``, if there is one.
    """
    for observer in tuple(_observers) if observed() else ():
        observer(module, weights, visible, alpha)


def announce(is_teller: Callable[[nn.Module], bool]) -> None:
    """Say which modules :func:`tell`: those that ``is_teller`` is true of."""
    if is_teller not in _announced:
        _announced.append(is_teller)


def tells(module: nn.Module) -> bool:
    """Whether a module is of those that were announced."""
    return any(is_teller(module) for is_teller in _announced)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """While the context is open every :func:`tell` calls ``observer(module, weights, visible, alpha)``."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def unobserved() -> Iterator[None]:
    """Have nobody look at what this thread does while the context is open."""
    thread = get_ident()
    _aside.append(thread)
    try:
        yield
    finally:
        _aside.remove(thread)
