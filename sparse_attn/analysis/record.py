"""Recording of the attention of any model during forward passes."""

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
from sparse_attn.masks import ScoreShape, causal_mask, merge_multihead_masks, visible_pairs
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.sparse import SparseAttention
from sparse_attn.observe import Observer, is_reporter, observe_weights, pause_observers, weights_are_observed

__all__ = ["record_attention"]

_ARGUMENTS = list(signature(nn.MultiheadAttention.forward).parameters)[1:]
_WANTED = {"need_weights": True, "average_attn_weights": False}


def record_attention(model: nn.Module, *, weights: bool = False) -> AbstractContextManager[AttentionRecord]:
    """Record statistics of every attention head of a model while the context is open.

    Four kinds of modules are recorded: `nn.MultiheadAttention`, of this library and of torch; `SparseAttention`; the
    attention of a Hugging Face model with an `attn_implementation` of this library, such as "entmax"; and any other
    module that calls `sparse_attn.observe.report_weights` (if a model has no other attention, its modules must be
    known to `sparse_attn.observe.register_reporter`). Memory is constant in the number of passes: the record holds sums
    over the queries for each head.

    Every call of a layer counts, and in each call every query that gives weight to some key. A fully masked query does
    not count. A query at a padded position counts, since no mask marks it. Density is measured over the pairs that the
    masks of the call leave visible. In training mode the weights are those after dropout, which also removes weights:
    to measure a model, put it in `eval()`. With activation checkpointing, close the context after the backward pass, in
    which layers run again without being counted.

    The model computes the same function as without a record. Layers of this library compute weights even where a
    fused kernel would not, so outputs and gradients can differ by rounding. Other layers run unchanged, and then
    again to obtain their weights: without gradient or hooks, with new dropout, and with the random state restored
    afterwards. Weights take (N, H, L, S) numbers during a call. The record skips with a warning: a user's class whose
    `forward` has no arguments `need_weights` and `average_attn_weights`, a call that fails to return weights, and
    calls inside transforms of `torch.func`.

    Two settings of the whole process change until the last record closes. First, torch's fused inference path for
    transformer encoders is off (`torch.backends.mha.set_fastpath_enabled`), since it never calls the attention layer;
    without that path, outputs at padded positions are not zeros. Second, compiled code runs uncompiled
    (`torch.compiler.set_stance`), since compiled code may ignore new hooks. When the context closes, also by an
    exception, the model is as before; the record stays readable. A copy of the model made inside the context is not
    recorded.

    Args:
        model: any module; it may itself be an attention layer, recorded under the name "". A layer found under
            several names is recorded under the first.
        weights: also keep the weights of each layer's last call.

    Returns:
        A context manager that returns the record: a mapping from the names of the called layers to `HeadStatistics`,
        which prints as a table.

    Raises:
        TypeError: if `model` is not a module, or `weights` not a bool.
        ValueError: if the model has no attention that can be recorded, such as Hugging Face models that do not use
            transformers' attention interface (BLOOM).

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
            "model must have nn.MultiheadAttention or SparseAttention layers that give weights, have modules known to "
            "sparse_attn.observe.register_reporter, or be a Hugging Face model whose attention calls an "
            "attn_implementation of this library, such as 'entmax'; "
            f"got {type(model).__name__}, which has no such layer"
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
    @torch.no_grad()  # activation checkpointing counts the tensors that a forward saves, including those from reading α
    def count(module: nn.Module, weights: Tensor, visible: Tensor | None, alpha: float | Tensor | None) -> None:
        if module in names and not _recomputing():
            with _warning_of_errors(names[module]):
                if torch._C._are_functorch_transforms_active():
                    raise RuntimeError("inside a transform of torch.func, weights have no values to sum up")
                alpha = getattr(module, "alpha", None) if alpha is None else alpha
                record.add(names[module], weights, visible, alpha)

    with ExitStack() as stack:
        stack.enter_context(_plain_process())
        stack.enter_context(observe_weights(count))
        for layer, positional in asked.items():
            hook = _Ask(layer, names[layer], positional, count)
            # Prepended, to run before hooks that free the parameters, such as those of sharded layers.
            stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield record


_switches = ExitStack()
_open_records = 0
_opening = threading.Lock()


@contextmanager
def _plain_process() -> Iterator[None]:
    """The settings of the process that are changed while any record is open; records may close in any order."""
    global _open_records
    with _opening:
        if not _open_records:
            _switches.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            # Hooks alone make the encoder layer take the slow path, but nn.TransformerEncoder would still pass nested
            # tensors to the layer, for which attention returns no weights.
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
    """Whether a backward pass is running a layer again (activation checkpointing), whose call was counted already."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def _warning_of_errors(name: str) -> Iterator[None]:
    """Turns errors of the recording into warnings, so that a model does not fail because of its record."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"a call of {name!r} is not recorded: {type(error).__name__}: {error}", stacklevel=2)


def _positional_arguments(layer: nn.MultiheadAttention) -> list[str] | None:
    """The names of a layer's positional arguments; None if its forward cannot return the weights of each head."""
    parameters = signature(layer.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if Parameter.VAR_KEYWORD not in kinds and not parameters.keys() >= _WANTED.keys():
        return None
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, parameter in parameters.items() if parameter.kind in by_position]
    return found + _ARGUMENTS[len(found) :] if Parameter.VAR_POSITIONAL in kinds else found


class _Ask:
    """A hook that runs its layer a second time to obtain the weights of each head.

    The first call is left unchanged, since its result may depend on the weights being requested: for a query without a
    visible key, torch's layer returns NaN with weights, and may return zeros without.
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
        kind = next(iter(devices)).type if devices else "cuda"  # torch before 2.12 does not accept None
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind), pause_observers():
            answer = self.layer.forward(*positional, **named)
        weights = answer[1] if isinstance(answer, tuple) and len(answer) == 2 else None
        if not isinstance(weights, Tensor) or weights.shape[-3:-2] != (self.layer.num_heads,):
            raise TypeError(f"{type(self.layer).__name__}.forward gave no weights of each head")
        return weights


class _Left:
    """Replaces the hook in a copy of the model, and removes itself at the first call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for key in [key for key, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]


def _visible(layer: nn.MultiheadAttention, asked: dict[str, Any], weights: Tensor) -> Tensor | None:
    """The pairs that the masks of a call leave visible; every query sees the keys that the layer appends."""
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
        mask = merge_multihead_masks(attn_mask, padding, ScoreShape(batch, heads, queries, keys))
    except (ValueError, TypeError):  # the layer has its own mask convention
        return None
    visible = visible_pairs(mask, False, weights)
    if visible is None:
        return None
    return F.pad(visible[0] if visible.dim() > weights.dim() else visible, (0, added), value=True)
