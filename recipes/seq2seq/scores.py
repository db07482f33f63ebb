"""The scores of a model on a data set: loss, support, metrics, and every prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from sparse_attn.evaluation import evaluating

from .metrics import EDIT_METRICS, TEXT_METRICS, by_group, computed, edit_scores, text_scores

if TYPE_CHECKING:
    from .task import Seq2SeqTask

Decode: TypeAlias = Callable[[Tensor], list[list[int]]]


@dataclass
class Scores:
    """The predictions and references of the words so far, and the sums of loss and support."""

    sources: list[str] = field(default_factory=list)
    predictions: list[list[str]] = field(default_factory=list)
    references: list[list[list[str]]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    loss_sum: float = 0.0
    support_sum: int = 0
    tokens: int = 0
    names: Sequence[str] = ("per", "wer")
    join: Callable[[Sequence[str]], str] = " ".join
    bleu_tokenize: str = "13a"
    signatures: dict[str, str] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Mean ``loss`` and ``support`` per token under teacher forcing, and the requested metrics.

        If the words belong to several groups, such as languages, a metric is the mean over the groups, and ``per/hun``
        is the metric of one group. The unit of the loss depends on the model's output: nats for softmax. The support is
        the number of possible next tokens. An ensemble has no loss and no support.
        """
        means = {"loss": self.loss_sum / self.tokens, "support": self.support_sum / self.tokens} if self.tokens else {}
        scores, parts = self.scores()
        return {
            **means,
            **scores,
            **{f"{name}/{part}": x for part, found in parts.items() for name, x in found.items()},
        }

    def scores(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The metrics of all words and of every group; see :func:`by_group`."""
        return by_group(self._score, self.groups or [""] * len(self.predictions))

    def _score(self, chosen: Sequence[int]) -> dict[str, float]:
        predictions = [self.predictions[index] for index in chosen]
        references = [self.references[index] for index in chosen]
        scores: dict[str, float] = {}
        names = computed(self.names)
        if set(names) & set(EDIT_METRICS):
            scores.update(edit_scores(predictions, references))
        if set(names) & set(TEXT_METRICS):
            written = [self.join(prediction) for prediction in predictions]
            accepted = [[self.join(reference) for reference in texts] for texts in references]
            found, self.signatures = text_scores(written, accepted, bleu_tokenize=self.bleu_tokenize)
            scores.update(found)
        return scores


@torch.no_grad()
def score(
    task: Seq2SeqTask, loader: Iterable[dict[str, Any]], decode: Decode | None = None, *, losses: bool = True
) -> Scores:
    """Predicts every word of an evaluation loader and scores the predictions; the task's mode is not changed.

    Args:
        task: The model, with the vocabularies of the data.
        loader: Evaluation batches.
        decode: A function from source ids (N, S) to the target ids of each row; greedy decoding if not given.
        losses: Whether to compute loss and support, which an ensemble does not have.
    """
    scores = task.new_scores()
    with evaluating(task):
        for batch in loader:
            tensors = ("source", "target_in", "target_out")
            batch = {**batch, **{name: batch[name].to(task.device) for name in tensors}}
            task.score_batch(batch, scores, decode, losses=losses)
    return scores
