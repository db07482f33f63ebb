"""Evaluation mode, and passes over batches that measure a model's loss and the density of each head for given α."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.ops.entmax import entmax_along
from sparse_attn.swap import replaced_for_a_while

Loss = Callable[[nn.Module, Any], Tensor]
Alpha = dict[str, list[float]]  # α of each head, by layer name
# By layer name, (C, H): for each of the H heads, C values of α in ascending order.
Candidates = dict[str, list[list[float]]]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within the context, the models are in evaluation mode; afterwards every module has its earlier mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Result:
    """The measurements of one pass over the batches: mean loss and densities of all heads, by layer name."""

    loss: float  # with the α in use
    density: dict[str, list[float]]  # with the α in use, (H,)
    tried: dict[str, list[list[float]]]  # with each candidate, (C, H)


class _Probe:
    """Maps scores with the α in use, and counts the keys with non-zero weight for this α and for each candidate."""

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


#: Runs a model on all batches with a probe per layer, and returns the sum of the losses and the number of batches.
RunPass = Callable[[Iterable[Any], Mapping[str, _Probe]], tuple[float, int]]


class SavedPasses:
    """Results of finished passes.

    If a file is given, the results are also in the file, which is replaced by a complete new file after each pass.
    """

    def __init__(self, file: str | Path | None, call: dict[str, Any]) -> None:
        if file is not None and not isinstance(file, str | Path):
            raise TypeError(f"state must be the path of a file or None, got {type(file).__name__}")
        self.file, self.call = None if file is None else Path(file), call
        self.passes: list[Result] = []
        if self.file is None:
            return
        if self.file.is_dir():
            raise ValueError(f"state must be a file, got the folder {str(file)!r}")
        if not self.file.parent.is_dir():
            raise ValueError(f"state must be a file in a folder that exists, got {str(file)!r}")
        if self.file.exists():
            earlier, self.passes = _read_passes(self.file, call)
            differs = next((key for key in call if earlier[key] != call[key]), None)
            if differs is not None:
                raise ValueError(
                    f"state must come from a call with {differs}={call[differs]} like this one, got {str(file)!r} of a "
                    f"call with {differs}={earlier[differs]}; delete the file to begin again"
                )

    def add(self, result: Result) -> None:
        """Append a result, and write the file if there is one."""
        self.passes.append(result)
        if self.file is not None:
            unfinished = self.file.with_name(self.file.name + ".unfinished")
            saved = {"call": self.call, "passes": [vars(one) for one in self.passes]}
            unfinished.write_text(json.dumps(saved), encoding="utf-8")
            os.replace(unfinished, self.file)


def _read_passes(file: Path, call: dict[str, Any]) -> tuple[dict[str, Any], list[Result]]:
    """The arguments (with the keys of ``call``) of the call that wrote a file, and the results of the passes."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        earlier, passes = dict(saved["call"]), [Result(**one) for one in saved["passes"]]
        if earlier.keys() == call.keys():
            return earlier, passes
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"state must be a file that calibrate wrote, got {str(file)!r}, which has other content")


class Passes:
    """Runs passes over the batches; passes that an earlier call has saved are not run again."""

    def __init__(
        self, run_pass: RunPass, batches: Iterable[Any], heads: dict[str, int], saved: SavedPasses, progress: bool
    ) -> None:
        self.run_pass, self.batches, self.heads, self.saved, self.progress = run_pass, batches, heads, saved, progress
        self.made = 0

    def __call__(self, alpha: Alpha, candidates: Candidates) -> Result:
        """The result of the next pass, in which the heads use ``alpha`` and the probes also try ``candidates``."""
        self.made += 1
        if self.made <= len(self.saved.passes):
            return self.saved.passes[self.made - 1]
        probes = {
            name: _Probe(_float64(alpha[name]), _float64(candidates[name]).view(-1, n))
            for name, n in self.heads.items()
        }
        total, count = self.run_pass(self.batches, probes)
        if not count:
            raise ValueError("batches must hold at least one batch, got none")
        if not math.isfinite(total):
            raise ValueError(f"loss must be finite, got the sum {total} over {count} batches")
        found = {name: probe.densities() for name, probe in probes.items()}
        in_use = {name: densities[0] for name, densities in found.items()}
        result = Result(total / count, in_use, {name: densities[1:] for name, densities in found.items()})
        self.saved.add(result)
        if self.progress:
            mean = sum(map(sum, in_use.values())) / sum(map(len, in_use.values()))
            print(f"calibrate: pass {self.made}, density {mean:.3f}, loss {result.loss:.4f}", file=sys.stderr)
        return result


def _float64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def measured_attention(model: nn.Module, loss: Loss) -> Iterator[tuple[dict[str, int], RunPass]]:
    """Yields the number of heads of each attention layer, and a function that runs a pass with probes in the layers."""
    if _is_of_transformers(model):
        from sparse_attn.integrations.huggingface import probe

        def run_pass(batches: Iterable[Any], probes: Mapping[str, _Probe]) -> tuple[float, int]:
            with probe.probed(model, probes):  # type: ignore[arg-type]
                return _losses(model, batches, loss)

        yield probe.probed_heads(model), run_pass  # type: ignore[arg-type]
        return
    with replaced_for_a_while(model, None) as layers:

        def run_pass(batches: Iterable[Any], probes: Mapping[str, _Probe]) -> tuple[float, int]:
            try:
                for name, one in probes.items():
                    layers[name].mapping = lambda one=one: one  # type: ignore[method-assign, misc]
                return _losses(model, batches, loss)
            finally:
                for layer in layers.values():
                    vars(layer).pop("mapping", None)

        yield {name: layer.num_heads for name, layer in layers.items()}, run_pass


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


def loss_of_transformers(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns for a batch with labels, as the models of transformers do."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches must hold dicts of arguments of the model unless loss is given, got {type(batch).__name__}"
        )
    found = getattr(model(**batch), "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"batches must hold labels, or loss must be given: {type(model).__name__} returned no loss")
    return found
