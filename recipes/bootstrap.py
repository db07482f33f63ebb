"""The paired bootstrap: a test whether one system is better than another on the same test inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .predictions import Prediction

Array: TypeAlias = NDArray[np.float64]
# An array (inputs, numbers), and the function from sums over inputs (..., numbers) to scores (...).
Statistics: TypeAlias = tuple[Array, Callable[[Array], Array]]
_CHUNK = 500  # samples that are drawn at a time


class Difference(NamedTuple):
    """The score of a system minus that of the baseline.

    Attributes:
        mean: The difference on the test inputs.
        low: Lower end of the interval that contains 95 % of the differences on resampled inputs.
        high: Upper end of that interval.
        p: The two-sided p-value, at most 1. It is twice the smaller of two shares: the share of samples with a
            difference of at least 0, and the share with a difference of at most 0.
    """

    mean: float
    low: float
    high: float
    p: float


def statistics(metric: str, predictions: Sequence[Prediction], bleu_tokenize: str = "13a") -> Statistics | None:
    """Statistics of each input, and the function from their sums to the metric; None for chrF."""
    if metric == "bleu":
        return _bleu(predictions, bleu_tokenize)
    parts: dict[str, Callable[[Prediction], tuple[float, float]]] = {
        "wer": lambda one: (100.0 * (one.distance > 0), 1.0),
        "accuracy": lambda one: (100.0 * (one.distance == 0), 1.0),
        "per": lambda one: (100.0 * one.distance, float(one.length)),
        "edit_distance": lambda one: (float(one.distance), 1.0),
    }
    if metric not in parts:
        return None
    return np.array([parts[metric](one) for one in predictions]), lambda sums: sums[..., 0] / sums[..., 1]


def _bleu(predictions: Sequence[Prediction], tokenize: str) -> Statistics:
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(tokenize=tokenize, force=True, effective_order=True)
    found = [scorer.sentence_score(one.prediction, [one.reference]) for one in predictions]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in found]

    def score(sums: Array) -> Array:
        flat = [
            BLEU.compute_bleu(
                correct=[int(x) for x in row[:4]],
                total=[int(x) for x in row[4:8]],
                sys_len=int(row[8]),
                ref_len=int(row[9]),
            ).score
            for row in sums.reshape(-1, sums.shape[-1])
        ]
        return np.array(flat).reshape(sums.shape[:-1])

    return np.array(rows, dtype=np.float64), score


def paired_bootstrap(
    baseline: Sequence[Statistics],
    system: Sequence[Statistics],
    groups: Sequence[str],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The difference of two systems, each with one or several runs, on resampled test inputs.

    A sample draws inputs with replacement within each group, as many as the group has. All runs of both systems are
    scored on the same sample. The score of a system is the mean over its runs, and over the groups.

    Args:
        baseline: The statistics of every run of the baseline, for the same inputs in the same order.
        system: The statistics of every run of the system, in the same form.
        groups: The group of every input.
        samples: Number of resampled sets of inputs.
        seed: Seed of the random numbers.

    Example:
        >>> runs = [(np.array([[wrong, 1.0] for wrong in row]), lambda sums: sums[..., 0] / sums[..., 1])
        ...         for row in ([1, 1, 1, 0], [0, 0, 1, 0])]
        >>> paired_bootstrap(runs[:1], runs[1:], [""] * 4, samples=100).mean
        -0.5

    Reference:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation" (EMNLP), section 3.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(group, []).append(index)

    def difference(weights: Callable[[int], Array]) -> Array:
        total: Any = 0.0
        for members in parts.values():
            drawn = weights(len(members))
            means = [
                np.mean([score(drawn @ values[members]) for values, score in runs], axis=0)
                for runs in (system, baseline)
            ]
            total = total + (means[0] - means[1]) / len(parts)
        return np.asarray(total)

    mean = float(difference(lambda size: np.ones((1, size)))[0])
    # A row of weights counts how often a sample draws each input. Samples are drawn in chunks, since all at once would
    # need gigabytes.
    chunks = [min(_CHUNK, samples - done) for done in range(0, samples, _CHUNK)]
    drawn = np.concatenate(
        [
            difference(lambda size, count=count: rng.multinomial(size, np.full(size, 1 / size), count).astype(float))  # type: ignore[misc]
            for count in chunks
        ]
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    return Difference(mean, float(low), float(high), float(min(1.0, p)))
