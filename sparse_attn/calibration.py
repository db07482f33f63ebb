"""Calibration of a dense model: α per head or layer for a given density, or for a bounded increase of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparse_attn.checks import check_bool, check_interval, check_module, check_number
from sparse_attn.evaluation import (
    Alpha,
    Candidates,
    Loss,
    Passes,
    Result,
    SavedPasses,
    evaluating,
    loss_of_transformers,
    measured_attention,
)

__all__ = ["Calibration", "calibrate"]

_CANDIDATES = 9  # values of α tried in one pass over the batches
# The largest distance of the candidates from the α in use, as a share of the range of α, one entry per pass. The passes
# are repeated because the best α of a layer changes when other layers get sparser.
_SPREADS = (0.25, 0.08, 0.025)
_LOWEST = 0.01  # the lowest density that is tried for a bounded loss
_HALVINGS = 6  # number of bisection steps on the logarithm of the density


class Calibration(dict[str, list[float]]):
    """``{layer name: α of each head}``, for ``add_alpha`` and ``replace_attention``.

    ``json.dump`` writes the α, but not the attributes.

    Attributes:
        density: ``{layer name: density of each head}`` with these α: the share of visible keys that have weight.
        loss_before: Mean loss of the dense model on the batches.
        loss_after: Mean loss on the batches with these α.
    """

    density: dict[str, list[float]]
    loss_before: float
    loss_after: float


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
    its queries see. With ``loss_increase``, the function searches for the lowest density, at least 0.01, at which the
    loss exceeds the loss of the dense model by at most this amount. The density is the same for every head (or every
    layer). All heads are made sparse at the same time, because a sparse layer changes the scores of later layers.

    The function makes 8 passes over the batches for ``density``, and for ``loss_increase`` one pass plus 4 for each of
    up to 7 densities. Memory does not grow with the number of batches. A head that would need a larger α than
    ``alpha_max`` gets ``alpha_max``.

    Args:
        model: A ``transformers.PreTrainedModel``, or any module with ``nn.MultiheadAttention`` layers. It computes in
            evaluation mode; afterwards the model is as before, also after an error or an interruption.
        batches: Batches for ``loss``: a list or a ``DataLoader``. They are read several times. For a model of
            transformers, each batch is a dict of keyword arguments of ``forward``, with ``labels``.
        density: The target density, in (0, 1].
        loss_increase: The largest allowed increase of the mean loss, at least 0.
        per: ``"head"``: each head has its own α; ``"layer"``: all heads of a layer have the same α, and the density is
            the mean over the heads of the layer.
        loss: ``loss(model, batch)``, a scalar. By default ``model(**batch).loss``.
        alpha_max: The largest α, above 1. If it is above 2, ``add_alpha`` and ``replace_attention`` need
            ``alpha_range=(1.0, alpha_max)``.
        state: A file in which finished passes are recorded, so that an interrupted call can continue. The file is kept:
            a repeated call with the same arguments reads its result from the file.
        progress: Whether to write a line for each pass to standard error.

    Returns:
        ``{layer name: α of each head}``, with the attributes ``density``, ``loss_before`` and ``loss_after``.
        ``add_alpha(model, alpha_init=result)`` and ``replace_attention(model, alpha_init=result)`` accept it.

    Raises:
        TypeError: An argument has a wrong type, or ``batches`` can be read only once.
        ValueError: Both or neither of ``density`` and ``loss_increase`` are given; an argument has a value that is not
            allowed; there are no batches; the model has no attention or no loss; a loss is not finite; or ``state`` is
            a folder, is in a folder that does not exist, was not written by this function or belongs to another call.

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
    check_bool(progress, "progress")
    _check(batches, density, loss_increase, per, loss, alpha_max)
    loss = loss_of_transformers if loss is None else loss
    with evaluating(model), measured_attention(model, loss) as (heads, run_pass):
        if not heads:
            raise ValueError(
                "model must have layers of nn.MultiheadAttention or AdaptiveSparseMultiheadAttention, "
                f"got neither in {type(model).__name__}"
            )
        call = {"density": density, "loss_increase": loss_increase, "per": per, "alpha_max": alpha_max}
        passes = Passes(run_pass, batches, heads, SavedPasses(state, {**call, "heads": heads}), progress)
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


def _for_loss(search: _Search, dense: Alpha, before: Result, start: Candidates, bound: float) -> tuple[Alpha, Result]:
    """α and result of the lowest density whose loss is within the bound, by bisection of the density's logarithm.

    If no density is within the bound, the result is the dense model.
    """
    best, low, high = (dense, before), math.log(_LOWEST), 0.0
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


class _Search:
    """Finds α for a density from the densities measured in passes."""

    def __init__(self, passes: Passes, heads: dict[str, int], by_layer: bool, most: float) -> None:
        self.passes, self.heads, self.by_layer, self.most = passes, heads, by_layer, most

    def for_density(self, density: float, alpha: Alpha, *, twice: bool = False) -> tuple[Alpha, Result]:
        """α with the target density, searched near the given α, and the result of a pass with the α that was found."""
        for spread in _SPREADS * (1 + twice):
            candidates = self.around(alpha, spread)
            alpha = self.solve(candidates, self.passes(alpha, candidates), density)
        return alpha, self.passes(alpha, {name: [] for name in alpha})

    def around(self, alpha: Alpha, spread: float) -> Candidates:
        """Candidates around each α, inside the range; ``spread`` is the largest distance, in widths of the range."""
        low, high = 1.0, self.most
        width = spread * (high - low)
        centre = torch.tensor([value for values in alpha.values() for value in values], dtype=torch.float64)
        first, last = (centre - width).clamp(low, high), (centre + width).clamp(low, high)
        steps = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)[:, None]
        split = (first + steps * (last - first)).split(list(self.heads.values()), 1)
        return {name: part.tolist() for name, part in zip(self.heads, split, strict=True)}

    def solve(self, candidates: Candidates, measured: Result, density: float) -> Alpha:
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
    """The α at which a density that decreases with α reaches the target, by linear interpolation of log density."""
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
        raise ValueError(f"exactly one of density and loss_increase must be given, got {density} and {loss_increase}")
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
    if isinstance(batches, Mapping):
        raise TypeError(f"batches must be a list of batches or a DataLoader, got one {type(batches).__name__}")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator | str):
        raise TypeError(
            f"batches must be iterable several times, such as a list or a DataLoader, got {type(batches).__name__}"
        )
    check_number(alpha_max, "alpha_max")
    check_interval(alpha_max, "alpha_max", above=1.0, below=math.inf)
