"""Target prefixes, and the distribution of their next token under one model or an ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..model import Seq2SeqTransformer
from ..output import next_token_log_probabilities
from ..tokenizer import BOS, PAD

#: One model, or the models of an ensemble, whose next-token probabilities are averaged.
Models: TypeAlias = Seq2SeqTransformer | Sequence[Seq2SeqTransformer]


@dataclass(frozen=True)
class Hypothesis:
    """An output of the model.

    Attributes:
        tokens: Target ids without special tokens.
        log_probability: Natural logarithm of the probability of the tokens and the end-of-sequence token.
        finished: False if the hypothesis was cut at ``max_length`` and cannot end there, or if the budget of an exact
            search was reached first. The probability then includes only the tokens.
    """

    tokens: list[int]
    log_probability: float
    finished: bool = True


def as_models(models: Models) -> list[Seq2SeqTransformer]:
    """The members of an ensemble, or the one model.

    Raises:
        ValueError: There is no model, or two models have vocabularies of different sizes.
    """
    members = [models] if isinstance(models, Seq2SeqTransformer) else list(models)
    if not members:
        raise ValueError("model must be a Seq2SeqTransformer or several, got none")
    for side in ("source", "target"):
        sizes = {getattr(model, f"{side}_embedding").tokens.num_embeddings for model in members}
        if len(sizes) > 1:
            got = ", ".join(map(str, sorted(sizes)))
            raise ValueError(f"models of an ensemble must have the same {side} vocabulary, got sizes {got}")
    return members


class Prefixes:
    """A batch of prefixes that all grow by one token per step, with cached keys and values.

    Args:
        models: One model, or several whose probabilities are averaged.
        source: (N, S) token ids, 0 = padding; every row begins with the empty prefix.
    """

    def __init__(self, models: Sequence[Seq2SeqTransformer], source: Tensor) -> None:
        self.models = models
        self.padding = source == PAD
        self.memories = [model.encode(source) for model in models]
        self.caches = [model.new_caches() for model in models]

    def step(self, token: Tensor) -> Tensor:
        """Appends a token (N,) to every prefix, and returns log-probabilities (N, V) of the next token."""
        parts = []
        for model, memory, caches in zip(self.models, self.memories, self.caches, strict=True):
            logits = model.decode(token[:, None], memory, self.padding, caches)[:, -1]
            parts.append(next_token_log_probabilities(logits, model.output_alpha))
        return mean_log_probabilities(parts)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order."""
        self.padding = self.padding[rows]
        self.memories = [memory[rows] for memory in self.memories]
        for caches in self.caches:
            for cache in caches:
                cache.select(rows)


class Sources:
    """Encoded source rows; one call takes prefixes of different lengths.

    Args:
        models: One model, or several whose probabilities are averaged.
        source: (N, S) token ids, 0 = padding.
    """

    def __init__(self, models: Sequence[Seq2SeqTransformer], source: Tensor) -> None:
        self.models = models
        self.padding = source == PAD
        self.memories = [model.encode(source) for model in models]

    def next_tokens(self, rows: Sequence[int], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities (n, V) of the next token of n prefixes; ``rows`` has the source row of each prefix."""
        device = self.padding.device
        row = torch.tensor(rows, device=device)
        length = max(map(len, prefixes))
        target = torch.tensor([[BOS, *prefix, *[PAD] * (length - len(prefix))] for prefix in prefixes], device=device)
        last = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        at = torch.arange(len(prefixes), device=device)
        parts = []
        for model, memory in zip(self.models, self.memories, strict=True):
            hidden = model.decoder(model.target_embedding(target), memory[row], self.padding[row])[at, last]
            parts.append(next_token_log_probabilities(model.output(hidden), model.output_alpha))
        return mean_log_probabilities(parts)


def mean_log_probabilities(parts: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of the probabilities; a single tensor is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    mean: Tensor = torch.stack(list(parts)).logsumexp(0) - math.log(len(parts))
    return mean
