"""Calibration of a dense model: α per head or layer for a given density, or for a bounded increase of the loss."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_interval, check_module, check_number
from sparse_attn.ops.entmax import entmax_along
from sparse_attn.swap import replaced_for_a_while

__all__ = ["Calibration", "calibrate"]

Loss = Callable[[nn.Module, Any], Tensor]

_CANDIDATES = 9  # values of α tried in one pass over the batches
# Distances of a pass's candidates from the α in use, as shares of the range: α changes when other layers get sparser.
_SPREADS = (0.25, 0.08, 0.025)
_SMALLEST = 0.01  # the lowest density for a bounded loss
_HALVINGS = 6  # number of bisection steps on the logarithm of the density


class Calibration(dict[str, list[float]]):
    """``{layer name: α of each head}``, for ``add_alpha`` and ``replace_attention``; ``json.dump`` writes it.

    Attributes:
        density: ``{layer name: density of each head}`` with these α: the share of visible keys that have weight.
        loss_before: Mean loss of the batches in the dense model.
        loss_after: The same with these α.
    """

    density: dict[str, list[float]]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class _Result:
    """The measurements of one pass over the batches with given α."""

    loss: float
    density: dict[str, list[float]]
    tried: dict[str, list[list[float]]]  # density with each candidate of each head


class _Probe:
    """Maps scores with the α in use, and counts the keys that would have non-zero weight with each candidate."""

    def __init__(self, alpha: Tensor, candidates: Tensor) -> None:
        self.alpha, self.candidates = alpha, candidates  # (H,) and (C, H), float64
        self.used = torch.zeros(len(candidates) + 1, len(alpha), dtype=torch.float64)
        self.visible = torch.zeros(len(alpha), dtype=torch.float64)

    def __call__(self, scores: Tensor, sinks: int = 0) -> Tensor:
        detached = scores.detach()
        dims = [dim for dim in range(scores.dim()) if dim != scores.dim() - 3]
        self.visible += (detached[..., sinks:] > -math.inf).sum(dims).cpu()
        for used, alpha in zip(self.used[1:], self.candidates, strict=True):
            used += (self._map(detached, alpha)[..., sinks:] > 0).sum(dims).cpu()
        weights = self._map(scores, self.alpha)
        self.used[0] += (weights.detach()[..., sinks:] > 0).sum(dims).cpu()
        return weights

    def densities(self) -> list[list[float]]:
        """The density with the α in use and with each candidate, per head."""
        return (self.used / self.visible.clamp(min=1)).tolist()

    @staticmethod
    def _map(scores: Tensor, alpha: Tensor) -> Tensor:
        return entmax_along(scores, alpha.to(scores.device, scores.dtype).view(-1, 1, 1), -1, None)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float | None = None,
    loss_increase: float | None = None,
    per: Literal["head", "layer"] = "head",
    loss: Loss | None = None,
    alpha_max: float = 2.0,
    state: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Find α of every attention head of a dense model, without training it and without changing it.

    Give one of two targets. With ``density``, every head (or every layer) gives weight to this share of the keys that
    its queries see. With ``loss_increase``, the function finds the lowest density, at least 0.01 and equal for all
    heads, at which the loss exceeds that of the dense model by at most this amount. All heads are made sparse at the
    same time, since a sparse layer changes the scores of later layers.

    The function makes 8 passes over the batches for a density; for ``loss_increase``, 4 for each of up to 7 densities
    and one more. Memory does not grow with the number of batches. A head that would need a larger α than ``alpha_max``
    gets ``alpha_max``.

    Args:
        model: A ``transformers.PreTrainedModel``, or any module with ``nn.MultiheadAttention`` layers. It computes in
            evaluation mode; afterwards the model is as before, also after an error or an interruption.
        batches: Batches for ``loss``, which are read several times: a list or a ``DataLoader``. For a model of
            transformers, each is a dict of keyword arguments of its ``forward``, with ``labels``.
        density: The target density, in (0, 1].
        loss_increase: The largest allowed increase of the mean loss, at least 0.
        per: ``"head"``: each head has its own α; ``"layer"``: all heads of a layer have the same, and the density is
            that of the layer.
        loss: ``loss(model, batch)``, a scalar. By default ``model(**batch).loss``.
        alpha_max: The largest α, above 1. If it is above 2, ``add_alpha`` and ``replace_attention`` need
            ``alpha_range=(1.0, alpha_max)``.
        state: A file in which finished passes are recorded, so that an interrupted call continues after the last one.
            The file is kept; the same call reads its result from the file.
        progress: Whether to write a line for each pass to standard error.

    Returns:
        ``{layer name: α of each head}``, with the attributes ``density``, ``loss_before`` and ``loss_after``.
        ``add_alpha(model, alpha_init=result)`` and ``replace_attention(model, alpha_init=result)`` accept it.

    Raises:
        TypeError: An argument has a wrong type, or ``batches`` can be read only once.
        ValueError: Both or neither of ``density`` and ``loss_increase`` are given, or one is out of range; there are no
            batches; the model has no attention or no loss; a loss is not finite; or ``state`` belongs to another call.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        >>> batches = [torch.randn(3, 7, 16) for _ in range(2)]
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> found = calibrate(model, batches, density=0.5, loss=loss, progress=False)
        >>> [(name, len(alpha)) for name, alpha in found.items()]
        [('layers.0.self_attn', 2)]

    Reference:
        The mapping is that of Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers".
    """
    check_module(model)
    _check(batches, density, loss_increase, per, loss, alpha_max)
    loss = _loss_of_transformers if loss is None else loss
    with evaluating(model), _attention(model, loss) as (heads, passing):
        if not heads:
            raise ValueError(
                "model must have attention with an α, nn.MultiheadAttention or AdaptiveSparseMultiheadAttention, "
                f"got none in {type(model).__name__}"
            )
        call = {"density": density, "loss_increase": loss_increase, "per": per, "alpha_max": alpha_max}
        passes = _Passes(passing, batches, heads, _State(state, {**call, "heads": heads}), progress)
        search = _Search(passes, heads, per == "layer", float(alpha_max))
        dense = {name: [1.0] * number for name, number in heads.items()}
        start = search.around(dense, 1.0)
        before = passes(dense, start)
        if density is not None:
            alpha, after = search.for_density(density, search.solve(start, before, density), twice=True)
        else:
            assert loss_increase is not None
            alpha, after = _for_loss(search, dense, before, start, before.loss + loss_increase)
    result = Calibration(alpha)
    result.density, result.loss_before, result.loss_after = after.density, before.loss, after.loss
    return result


def _for_loss(
    search: _Search, dense: _Alpha, before: _Result, start: _Candidates, bound: float
) -> tuple[_Alpha, _Result]:
    """The lowest density whose loss is within the bound, by bisection of its logarithm, or the dense model."""
    best, low, high = (dense, before), math.log(_SMALLEST), 0.0
    wanted = low  # if the lowest density is within the bound, no search is needed
    for _ in range(1 + _HALVINGS):
        found = search.for_density(math.exp(wanted), search.solve(start, before, math.exp(wanted)))
        if found[1].loss <= bound:
            best, high = found, wanted
        else:
            low = wanted
        if high <= low:
            break
        wanted = (low + high) / 2
    return best


_Alpha = dict[str, list[float]]
_Candidates = dict[str, list[list[float]]]  # ascending, (C, H)


class _Search:
    """Finds α for a density from the densities measured in passes."""

    def __init__(self, passes: _Passes, heads: dict[str, int], by_layer: bool, most: float) -> None:
        self.passes, self.heads, self.by_layer, self.most = passes, heads, by_layer, most

    def for_density(self, density: float, alpha: _Alpha, *, twice: bool = False) -> tuple[_Alpha, _Result]:
        """α with the target density, searched near the given α, and the result of a pass with it."""
        for spread in _SPREADS * (1 + twice):
            candidates = self.around(alpha, spread)
            alpha = self.solve(candidates, self.passes(alpha, candidates), density)
        return alpha, self.passes(alpha, {name: [] for name in alpha})

    def around(self, alpha: _Alpha, spread: float) -> _Candidates:
        """Candidates below and above each α, at distances that are shares of the range of α, inside the range."""
        low, high = 1.0, self.most
        width = spread * (high - low)
        centre = torch.tensor([value for values in alpha.values() for value in values], dtype=torch.float64)
        first, last = (centre - width).clamp(low, high), (centre + width).clamp(low, high)
        steps = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)[:, None]
        split = (first + steps * (last - first)).split(list(self.heads.values()), 1)
        return {name: part.tolist() for name, part in zip(self.heads, split, strict=True)}

    def solve(self, candidates: _Candidates, measured: _Result, density: float) -> _Alpha:
        """The α that gives the target density, according to the measurements."""
        alpha = {}
        for name, tried in candidates.items():
            found = measured.tried[name]
            if self.by_layer:
                found = [[sum(row) / len(row)] * len(row) for row in found]
            heads = zip(zip(*tried, strict=True), zip(*found, strict=True), strict=True)
            alpha[name] = [_crossing(values, densities, density) for values, densities in heads]
        return alpha


def _crossing(values: Sequence[float], densities: Sequence[float], density: float) -> float:
    """The value at which a decreasing density reaches the target; its logarithm is interpolated linearly."""
    if densities[0] <= density:
        return values[0]
    for (first, above), (second, below) in zip(
        _pairs(values, densities), _pairs(values[1:], densities[1:]), strict=False
    ):
        if below <= density:
            share = math.log(above / density) / math.log(above / max(below, 1e-12))
            return first + share * (second - first)
    return values[-1]


def _pairs(values: Sequence[float], densities: Sequence[float]) -> Iterator[tuple[float, float]]:
    return zip(values, densities, strict=True)


class _State:
    """The passes of a call in a file, which is replaced by a complete new file after each pass."""

    def __init__(self, file: str | Path | None, call: dict[str, Any]) -> None:
        self.file, self.call = None if file is None else Path(file), call
        self.passes: list[dict[str, Any]] = []
        if self.file is not None and not self.file.parent.is_dir():
            raise ValueError(f"state must be a file in a folder that exists, got {str(file)!r}")
        if self.file is not None and self.file.exists():
            try:
                saved = json.loads(self.file.read_text(encoding="utf-8"))
                earlier, self.passes = saved["call"], saved["passes"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"state must be a file that calibrate wrote, got {str(file)!r}") from None
            if earlier != call:
                differs = next(key for key in call if earlier.get(key) != call[key])
                raise ValueError(
                    f"state must be of a call with the same {differs}, {call[differs]}, got {earlier.get(differs)} in "
                    f"{str(file)!r}; delete the file to begin again"
                )

    def add(self, result: _Result) -> None:
        self.passes.append(vars(result))
        if self.file is not None:
            unfinished = self.file.with_name(self.file.name + ".unfinished")
            unfinished.write_text(json.dumps({"call": self.call, "passes": self.passes}), encoding="utf-8")
            os.replace(unfinished, self.file)


Passing = Callable[[Iterable[Any], Mapping[str, _Probe]], tuple[float, int]]


class _Passes:
    """Passes over the batches; passes of an earlier, interrupted call are read from its state."""

    def __init__(
        self, passing: Passing, batches: Iterable[Any], heads: dict[str, int], state: _State, progress: bool
    ) -> None:
        self.passing, self.batches, self.heads, self.state, self.progress = passing, batches, heads, state, progress
        self.made = 0

    def __call__(self, alpha: _Alpha, candidates: _Candidates) -> _Result:
        self.made += 1
        if self.made <= len(self.state.passes):
            return _Result(**self.state.passes[self.made - 1])
        probes = {
            name: _Probe(_float64(alpha[name]), _float64(candidates[name]).view(-1, n))
            for name, n in self.heads.items()
        }
        total, count = self.passing(self.batches, probes)
        if not count:
            raise ValueError("batches must hold at least one batch, got none")
        if not math.isfinite(total):
            raise ValueError(f"loss must be finite, got {total} in {count} batches")
        found = {name: probe.densities() for name, probe in probes.items()}
        in_use = {name: densities[0] for name, densities in found.items()}
        result = _Result(total / count, in_use, {name: densities[1:] for name, densities in found.items()})
        self.state.add(result)
        if self.progress:
            mean = sum(map(sum, in_use.values())) / sum(map(len, in_use.values()))
            print(f"calibrate: pass {self.made}, density {mean:.3f}, loss {result.loss:.4f}", file=sys.stderr)
        return result


def _float64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; at the end, every module has its earlier mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _attention(model: nn.Module, loss: Loss) -> Iterator[tuple[dict[str, int], Passing]]:
    """The attention layers with their numbers of heads, and a function that runs a pass with a probe in each layer."""
    if _is_of_transformers(model):
        from sparse_attn.integrations.huggingface import probe

        def passing(batches: Iterable[Any], probes: Mapping[str, _Probe]) -> tuple[float, int]:
            with probe.probed(model, probes):  # type: ignore[arg-type]
                return _losses(model, batches, loss)

        yield probe.probed_heads(model), passing  # type: ignore[arg-type]
        return
    with replaced_for_a_while(model, None) as layers:

        def passing(batches: Iterable[Any], probes: Mapping[str, _Probe]) -> tuple[float, int]:
            try:
                for name, one in probes.items():
                    layers[name].mapping = lambda one=one: one  # type: ignore[method-assign, misc]
                return _losses(model, batches, loss)
            finally:
                for layer in layers.values():
                    vars(layer).pop("mapping", None)

        yield {name: layer.num_heads for name, layer in layers.items()}, passing


@torch.no_grad()
def _losses(model: nn.Module, batches: Iterable[Any], loss: Loss) -> tuple[float, int]:
    """The sum of the losses of all batches, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss must return a tensor with one number, got {got}")
        total, count = total + float(value), count + 1
    return total, count


def _is_of_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _loss_of_transformers(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches must hold mappings, the arguments of the model, got {type(batch).__name__}")
    found = getattr(model(**batch), "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"batches must hold labels, or loss must be given: {type(model).__name__} returned no loss")
    return found


def _check(
    batches: Iterable[Any],
    density: float | None,
    loss_increase: float | None,
    per: str,
    loss: Loss | None,
    alpha_max: float,
) -> None:
    """Raise unless the arguments are allowed."""
    if (density is None) == (loss_increase is None):
        raise ValueError(f"one of density and loss_increase must be given, got {density} and {loss_increase}")
    if density is not None:
        check_number(density, "density")
        check_interval(density, "density", above=0.0, below=1.0, closed=True)
    if loss_increase is not None:
        check_number(loss_increase, "loss_increase")
        if not 0 <= loss_increase < math.inf:
            raise ValueError(f"loss_increase must be a finite number of at least 0, got {loss_increase}")
    if per not in ("head", "layer"):
        raise ValueError(f"per must be 'head' or 'layer', got {per!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of model and batch, got {type(loss).__name__}")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator | str):
        raise TypeError(
            f"batches must be iterable several times, such as a list or a DataLoader, got {type(batches).__name__}"
        )
    check_number(alpha_max, "alpha_max")
    check_interval(alpha_max, "alpha_max", above=1.0, below=math.inf)
