"""Target prefixes, and the distribution of their next token under one model or an ensemble."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sparse_attn.checks import check_int

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
        finished: False if the hypothesis has ``max_length`` tokens and the end of the sequence has probability 0 there,
            or if an exact search used up its budget before a hypothesis ended. Then ``log_probability`` is that of the
            tokens alone.
    """

    tokens: list[int]
    log_probability: float
    finished: bool = True


def as_models(models: Models) -> list[Seq2SeqTransformer]:
    """The members of an ensemble, or the one model.

    Raises:
        TypeError: A member is not a Seq2SeqTransformer.
        ValueError: There is no model, or two models have vocabularies of different sizes.
    """
    members = list(models) if isinstance(models, Iterable) else [models]
    if not members:
        raise ValueError("model must be a Seq2SeqTransformer or several, got none")
    for member in members:
        if not isinstance(member, Seq2SeqTransformer):
            raise TypeError(f"model must be a Seq2SeqTransformer or several, got {type(member).__name__}")
    for side in ("source", "target"):
        sizes = {getattr(model, f"{side}_embedding").tokens.num_embeddings for model in members}
        if len(sizes) > 1:
            got = ", ".join(map(str, sorted(sizes)))
            raise ValueError(f"models of an ensemble must have the same {side} vocabulary, got sizes {got}")
    return members


def check_counts(**counts: int) -> None:
    """Raise unless every argument is an int of at least 1."""
    for name, count in counts.items():
        check_int(count, name)
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_source(source: Tensor) -> None:
    """Raise unless the source is a matrix of token ids."""
    if not isinstance(source, Tensor) or source.dtype not in (torch.int32, torch.int64):
        got = source.dtype if isinstance(source, Tensor) else type(source).__name__
        raise TypeError(f"source must be a tensor of int32 or int64 token ids, got {got}")
    if source.dim() != 2:
        raise ValueError(f"source must be (N, S), got shape {tuple(source.shape)}")


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
        """Log-probabilities (n, V) of the next token of ``n`` prefixes; ``rows`` has the source row of each prefix."""
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
