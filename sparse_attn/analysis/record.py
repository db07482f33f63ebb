"""Watch the attention of any model while it runs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn.analysis.statistics import AttentionRecord
from sparse_attn.masks import causal_mask, merge_multihead_masks, visible_pairs
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.sparse import SparseAttention
from sparse_attn.observe import Observer, is_reporter, observe_weights, pause_observers, weights_are_observed

__all__ = ["record_attention"]

_ARGUMENTS = list(signature(nn.MultiheadAttention.forward).parameters)[1:]
_WANTED = {"need_weights": True, "average_attn_weights": False}


def record_attention(model: nn.Module, *, weights: bool = False) -> AbstractContextManager[AttentionRecord]:
    """Sum up what every attention head of a model does while the context is open.

    Recorded are every `nn.MultiheadAttention`, ours and torch's own; every `SparseAttention`; the attention of a
    Hugging Face model that runs on ours (`attn_implementation="entmax"`); and any other module that calls
    `sparse_attn.observe.report_weights`. Any number of passes takes constant memory: sums over the queries, for each
    head.

    What counts: every call of a layer, and in it every query that gives weight to some key. A query that is masked
    fully does not; one at a padded position does, since no mask tells of it. Density is measured over the pairs that
    the masks of the call leave visible. In training mode the weights are those after dropout, which takes its share of
    the support: to measure a model, put it in `eval()`. With activation checkpointing, close the context after the
    backward pass, in which layers run once more and are not counted again.

    The model computes what it would without. Layers of ours make weights where a fused kernel made none, so that
    outputs and gradients may differ by rounding. A layer that is not ours is left alone and then run a second time,
    without gradient or hooks and with the random state put back, to see its weights; its dropout is drawn anew for
    that. Weights take (N, H, L, S) numbers for the time of a call. What cannot be recorded is left out with a warning:
    a class of one's own whose `forward` takes no `need_weights` and `average_attn_weights`, a call that fails to give
    weights, calls inside transforms of `torch.func`.

    Two things change in the whole process until the last record closes: torch's fused inference path for transformer
    encoders is off (`torch.backends.mha.set_fastpath_enabled`), as it never calls the attention layer, so that padded
    positions have other outputs than the zeros it gives; and compiled code runs uncompiled
    (`torch.compiler.set_stance`), as it may not look for new hooks. When the context closes, also by an exception, no
    trace is left on the model; the record stays readable. A copy made inside is not recorded.

    Args:
        model: any module; it may itself be an attention layer, recorded under the name "". A layer found under
            several names is recorded under the first.
        weights: also keep the weights of each layer's last call.

    Returns:
        A context manager that gives the record, a mapping from layer name to `HeadStatistics`, which prints as a table.
        It has the layers that have been called.

    Raises:
        TypeError: if `model` is no module, or `weights` no bool.
        ValueError: if there is no attention in the model that could be recorded, as in Hugging Face models that take
            the name of an attention implementation and ignore it (BLOOM).

    Example:
        >>> from sparse_attn import record_attention, replace_attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1).eval()
        >>> _ = replace_attention(model, alpha_init=[1.0, 2.0])
        >>> with record_attention(model) as record:
        ...     for length in (5, 7):
        ...         _ = model(torch.randn(3, length, 8))
        >>> heads = record["layers.0.self_attn"]
        >>> heads.alpha, heads.rows
        (tensor([1., 2.]), tensor([36, 36]))
        >>> bool(heads.density[0] == 1.0), bool(heads.density[1] < 1.0)
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(weights, bool):
        raise TypeError(f"weights must be a bool, got {type(weights).__name__}")
    names = {module: name for name, module in model.named_modules()}
    others = [m for m in names if isinstance(m, nn.MultiheadAttention) and not isinstance(m, SparseMultiheadAttention)]
    asked = {layer: positional for layer in others if (positional := _positional_arguments(layer)) is not None}
    ours = any(
        isinstance(module, (SparseMultiheadAttention, SparseAttention)) or is_reporter(module) for module in names
    )
    if not asked and not ours:
        raise ValueError(
            "model must have nn.MultiheadAttention or SparseAttention layers that give weights, or be a Hugging Face "
            "model whose attention calls an attn_implementation of ours, such as 'entmax'; "
            f"got {type(model).__name__} without any"
        )
    for layer in others:
        if layer not in asked:
            warnings.warn(
                f"{names[layer]!r} is not recorded: {type(layer).__name__}.forward does not take "
                f"{' and '.join(_WANTED)}",
                stacklevel=2,
            )
    return _recording(names, asked, AttentionRecord(keep_weights=weights))


@contextmanager
def _recording(
    names: dict[nn.Module, str], asked: dict[nn.MultiheadAttention, list[str]], record: AttentionRecord
) -> Iterator[AttentionRecord]:
    @torch.no_grad()  # checkpointing counts what a forward saves, also by reading α
    def count(module: nn.Module, weights: Tensor, visible: Tensor | None, alpha: float | Tensor | None) -> None:
        if module in names and not _recomputing():
            with _warning_of_errors(names[module]):
                if torch._C._are_functorch_transforms_active():
                    raise RuntimeError("inside a transform of torch.func weights have no values to sum up")
                alpha = getattr(module, "alpha", None) if alpha is None else alpha
                record.add(names[module], weights, visible, alpha)

    with ExitStack() as stack:
        stack.enter_context(_plain_process())
        stack.enter_context(observe_weights(count))
        for layer, positional in asked.items():
            hook = _Ask(layer, names[layer], positional, count)
            # In front of hooks that take the parameters away again, as those of sharded layers do.
            stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield record


_switches = ExitStack()
_open_records = 0
_opening = threading.Lock()


@contextmanager
def _plain_process() -> Iterator[None]:
    """What changes in the whole process from the first record that opens to the last that closes, in any order."""
    global _open_records
    with _opening:
        if not _open_records:
            _switches.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            # Hooks alone make the encoder layer take the slow path, but nn.TransformerEncoder would still hand it
            # nested tensors, for which no weights can be given.
            torch.backends.mha.set_fastpath_enabled(False)
            _switches.enter_context(torch.compiler.set_stance("force_eager"))
        _open_records += 1
    try:
        yield
    finally:
        with _opening:
            _open_records -= 1
            if not _open_records:
                _switches.close()


def _recomputing() -> bool:
    """Whether a backward pass runs a layer again, for a call that has been counted."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def _warning_of_errors(name: str) -> Iterator[None]:
    """A model that runs must not fail because it is recorded."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"a call of {name!r} is not recorded: {type(error).__name__}: {error}", stacklevel=2)


def _positional_arguments(layer: nn.MultiheadAttention) -> list[str] | None:
    """What a layer's arguments by position are called; None if it cannot be asked for the weights of each head."""
    parameters = signature(layer.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if Parameter.VAR_KEYWORD not in kinds and not parameters.keys() >= _WANTED.keys():
        return None
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, parameter in parameters.items() if parameter.kind in by_position]
    return found + _ARGUMENTS[len(found) :] if Parameter.VAR_POSITIONAL in kinds else found


class _Ask:
    """A hook that runs its layer again for the weights of each head, where the call itself may have made none.

    The call is not asked for them: with a query that sees nothing, torch's layer gives NaN if it makes weights and
    zeros if not.
    """

    def __init__(self, layer: nn.MultiheadAttention, name: str, positional: list[str], count: Observer) -> None:
        self.layer = layer
        self.name = name
        self.positional = positional
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if module is not self.layer or not weights_are_observed() or _recomputing():
            return
        with _warning_of_errors(self.name):
            weights = self._weights(args, kwargs)
            visible = _visible(self.layer, dict(zip(self.positional, args, strict=False), **kwargs), weights)
            if visible is not None:
                sees_nothing = ~visible.any(-1, keepdim=True)
                weights = weights.masked_fill(sees_nothing & weights.isnan(), 0.0)
            self.count(self.layer, weights, visible, None)

    def __reduce__(self) -> tuple[type[_Left], tuple[()]]:
        return _Left, ()

    def _weights(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        positional, named = list(args), dict(kwargs)
        for argument, wanted in _WANTED.items():
            if argument in self.positional[: len(positional)]:
                positional[self.positional.index(argument)] = wanted
            else:
                named[argument] = wanted
        devices = {x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"  # the default, which torch before 2.12 asks for by name
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind), pause_observers():
            answer = self.layer.forward(*positional, **named)
        weights = answer[1] if isinstance(answer, tuple) and len(answer) == 2 else None
        if not isinstance(weights, Tensor) or weights.shape[-3:-2] != (self.layer.num_heads,):
            raise TypeError(f"{type(self.layer).__name__}.forward gave no weights of each head")
        return weights


class _Left:
    """What a copy of the model has in the place of a hook: it goes at the first call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for key in [key for key, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]


def _visible(layer: nn.MultiheadAttention, asked: dict[str, Any], weights: Tensor) -> Tensor | None:
    """Which pairs the masks of a call leave; keys that the layer adds at the end are seen by all."""
    attn_mask, padding = asked.get("attn_mask"), asked.get("key_padding_mask")
    added = (layer.bias_k is not None) + layer.add_zero_attn
    batch = weights.shape[0] if weights.dim() == 4 else 1
    heads, queries, keys = weights.shape[-3:]
    keys -= added
    if attn_mask is None and asked.get("is_causal"):
        attn_mask = ~causal_mask(queries, keys, weights.device)
    try:
        if padding is not None and padding.dim() == 1:
            padding = padding[None]
        mask = merge_multihead_masks(attn_mask, padding, batch=batch, heads=heads, queries=queries, keys=keys)
    except (ValueError, TypeError):  # a layer with a mask convention of its own
        return None
    visible = visible_pairs(mask, False, weights)
    if visible is None:
        return None
    return F.pad(visible[0] if visible.dim() > weights.dim() else visible, (0, added), value=True)
