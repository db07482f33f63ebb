"""Reports of attention weights during a forward pass: an extension point for attention modules and observers.

:func:`sparse_attn.record_attention` uses hooks for torch's ``nn.MultiheadAttention``, which returns its weights. Other
attention modules report their weights, as every attention layer of this library does. Two steps make your own attention
module visible to a record: report the weights where they are computed, and register a function that recognises such
modules.

Example:
    >>> import torch
    >>> from torch import Tensor, nn
    >>> from sparse_attn import sparsemax
    >>> class Pooling(nn.Linear):
    ...     def forward(self, x: Tensor) -> Tensor:  # (N, S, E) to (N, E)
    ...         weights = sparsemax(super().forward(x).transpose(1, 2))  # (N, 1, S)
    ...         if weights_are_observed():
    ...             report_weights(self, weights.unsqueeze(1))
    ...         return (weights @ x).squeeze(1)
    >>> handle = register_reporter(lambda module: isinstance(module, Pooling))

    Until ``handle.remove()``, ``record_attention(model)`` records every ``Pooling`` of a model. Your own observer
    receives the weights too:

    >>> with observe_weights(lambda module, weights, visible, alpha: print(tuple(weights.shape))):
    ...     _ = Pooling(5, 1)(torch.randn(2, 3, 5))
    (2, 1, 1, 3)
    >>> handle.remove()
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Observer",
    "is_reporter",
    "observe_weights",
    "pause_observers",
    "register_reporter",
    "report_weights",
    "weights_are_observed",
]

#: Called as ``observer(module, weights, visible, alpha)``; see :func:`report_weights` for the arguments.
Observer = Callable[[nn.Module, Tensor, Tensor | None, float | Tensor | None], None]
_observers: list[Observer] = []
_paused: list[int] = []  # threads whose weights no observer receives
_reporters: OrderedDict[int, Callable[[nn.Module], bool]] = OrderedDict()  # by the id of their handle


def weights_are_observed() -> bool:
    """Whether an observer receives weights of this thread. If not, a module need not compute weights for a report."""
    return bool(_observers) and not (_paused and get_ident() in _paused)


def report_weights(
    module: nn.Module, weights: Tensor, visible: Tensor | None = None, alpha: float | Tensor | None = None
) -> None:
    """Pass attention weights to all active observers.

    Args:
        module: The module that attends.
        weights: (N, H, L, S): the weights by which the module multiplies its values (after dropout, if it has any).
        visible: True where a query may see a key; broadcasts against ``weights``. None: every query sees every key.
        alpha: The α with which the weights were computed, a number or one per head. If None, a record takes
            ``module.alpha``, if the module has this attribute; other observers receive None.
    """
    for observer in tuple(_observers) if weights_are_observed() else ():
        observer(module, weights, visible, alpha)


def register_reporter(reports: Callable[[nn.Module], bool]) -> RemovableHandle:
    """Register a function that recognises modules which call :func:`report_weights`.

    Without a registered function, :func:`sparse_attn.record_attention` refuses a model without other attention modules.

    Args:
        reports: Returns True for a module that reports its weights. If the same function is registered again, only the
            new handle is valid.

    Returns:
        A handle like those of torch's hooks: ``handle.remove()`` removes the function.

    Raises:
        TypeError: ``reports`` cannot be called.
    """
    if not callable(reports):
        raise TypeError(f"reports must be a function of a module, got {reports!r}")
    for known in [key for key, function in _reporters.items() if function == reports]:
        del _reporters[known]
    handle = RemovableHandle(_reporters)
    _reporters[handle.id] = reports
    return handle


def is_reporter(module: nn.Module) -> bool:
    """Whether a registered function says that ``module`` reports its weights."""
    return any(reports(module) for reports in _reporters.values())


@contextmanager
def observe_weights(observer: Observer) -> Iterator[None]:
    """Within the context, :func:`report_weights` calls ``observer(module, weights, visible, alpha)``.

    Args:
        observer: A function with the arguments of :func:`report_weights`. The thread of the forward pass calls it,
            unless :func:`pause_observers` is active in this thread.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def pause_observers() -> Iterator[None]:
    """Within the context, weights of this thread reach no observer."""
    thread = get_ident()
    _paused.append(thread)
    try:
        yield
    finally:
        _paused.remove(thread)
