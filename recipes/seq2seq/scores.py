"""The scores of a model on a data set: loss, phone and word error rate, and every prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .metrics import error_rates

if TYPE_CHECKING:
    from .task import Seq2SeqTask


@dataclass
class Scores:
    """What was predicted for the words seen so far, and how far it was from right."""

    sources: list[str] = field(default_factory=list)
    predictions: list[list[str]] = field(default_factory=list)
    references: list[list[list[str]]] = field(default_factory=list)
    loss_sum: float = 0.0
    tokens: int = 0

    def metrics(self) -> dict[str, float]:
        """Mean ``loss`` of a token under teacher forcing (nats), and ``per`` and ``wer`` in percent."""
        loss = self.loss_sum / self.tokens if self.tokens else math.nan
        return {"loss": loss, **error_rates(self.predictions, self.references)}


@torch.no_grad()
def score(task: Seq2SeqTask, loader: Iterable[dict[str, Any]]) -> Scores:
    """Predicts every word of an evaluation loader and compares; the task is left in the mode it was in."""
    training = task.training
    task.eval()
    scores = Scores()
    try:
        for batch in loader:
            tensors = ("source", "target_in", "target_out")
            task.score_batch({**batch, **{name: batch[name].to(task.device) for name in tensors}}, scores)
    finally:
        task.train(training)
    return scores
