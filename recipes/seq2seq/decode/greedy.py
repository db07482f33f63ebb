"""Greedy decoding of a batch, one token per step, with cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.evaluation import evaluating

from ..tokenizer import BOS, EOS
from .prefixes import Models, Prefixes, as_models, check_counts, check_source


def greedy_decode(model: Models, source: Tensor, *, max_length: int) -> list[list[int]]:
    """The most probable next token at every step, until the end-of-sequence token or ``max_length`` tokens.

    Args:
        model: One model, or several whose probabilities are averaged. Decoding runs in eval mode; afterwards each
            module has its earlier mode again.
        source: (N, S) token ids, 0 = padding.
        max_length: Maximum number of tokens per output, at least 1.

    Returns:
        One list of target ids per row, without special tokens.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: ``max_length`` is below 1, or ``source`` has another number of dimensions.

    Example:
        >>> from recipes.seq2seq.model import Seq2SeqTransformer
        >>> model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32)
        >>> len(greedy_decode(model, torch.randint(4, 11, (3, 7)), max_length=5))
        3
    """
    check_counts(max_length=max_length)
    check_source(source)
    models = as_models(model)
    with evaluating(*models), torch.no_grad():
        prefixes = Prefixes(models, source)
        rows = torch.arange(len(source), device=source.device)  # the unfinished rows
        token = torch.full((len(source),), BOS, device=source.device)
        output = torch.full((len(source), max_length), EOS, device=source.device)
        for step in range(max_length):
            token = prefixes.step(token).argmax(-1)
            output[rows, step] = token
            going = (token != EOS).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows, token = rows[going], token[going]
                prefixes.select(going)
    return [_until_end(row) for row in output.tolist()]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
