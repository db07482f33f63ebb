"""The scores of a model on a data set: loss, support, phone and word error rate, and every prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .metrics import error_rates

if TYPE_CHECKING:
    from .task import Seq2SeqTask

Decode: TypeAlias = Callable[[Tensor], list[list[int]]]


@dataclass
class Scores:
    """What was predicted for the words seen so far, and how far it was from right."""

    sources: list[str] = field(default_factory=list)
    predictions: list[list[str]] = field(default_factory=list)
    references: list[list[list[str]]] = field(default_factory=list)
    loss_sum: float = 0.0
    support_sum: int = 0
    tokens: int = 0

    def metrics(self) -> dict[str, float]:
        """Mean ``loss`` and ``support`` of a token under teacher forcing, and ``per`` and ``wer`` in percent.

        The unit of the loss is that of the model's output: nats for softmax. The support is the number of tokens that
        are possible next. An ensemble has neither.
        """
        means = {"loss": self.loss_sum / self.tokens, "support": self.support_sum / self.tokens} if self.tokens else {}
        return {**means, **error_rates(self.predictions, self.references)}


@torch.no_grad()
def score(
    task: Seq2SeqTask, loader: Iterable[dict[str, Any]], decode: Decode | None = None, *, losses: bool = True
) -> Scores:
    """Predicts every word of an evaluation loader and compares; the task is left in the mode it was in.

    Args:
        task: The model, with the vocabularies of the data.
        loader: Evaluation batches.
        decode: From source ids (N, S) to the target ids of each row; greedy decoding if not given.
        losses: Whether loss and support are wanted; an ensemble has neither.
    """
    training = task.training
    task.eval()
    scores = Scores()
    try:
        for batch in loader:
            tensors = ("source", "target_in", "target_out")
            batch = {**batch, **{name: batch[name].to(task.device) for name in tensors}}
            task.score_batch(batch, scores, decode, losses=losses)
    finally:
        task.train(training)
    return scores
