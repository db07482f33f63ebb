"""Greedy decoding of a batch, one token a step, with cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Seq2SeqTransformer
from .tokenizer import BOS, EOS, PAD, UNK


@torch.no_grad()
def greedy_decode(model: Seq2SeqTransformer, source: Tensor, *, max_length: int) -> list[list[int]]:
    """The most probable next token at every step, until the end-of-sequence token or ``max_length`` tokens.

    Args:
        model: Each module is left in the mode (train or eval) it was in; decoding itself is done in eval mode.
        source: (N, S) token ids, 0 = padding.
        max_length: Tokens at most, at least 1.

    Returns:
        One list of target ids per row, without special tokens.

    Raises:
        ValueError: ``max_length`` is below 1.

    Example:
        >>> model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32)
        >>> len(greedy_decode(model, torch.randint(4, 11, (3, 7)), max_length=5))
        3
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _decode(model, source, max_length)
    finally:
        for module, training in modes.items():
            module.training = training


def _decode(model: Seq2SeqTransformer, source: Tensor, max_length: int) -> list[list[int]]:
    memory, padding, caches = model.encode(source), source == PAD, model.new_caches()
    rows = torch.arange(len(source), device=source.device)  # the rows still being written
    token = torch.full((len(source), 1), BOS, device=source.device)
    output = torch.full((len(source), max_length), EOS, device=source.device)
    for step in range(max_length):
        logits = model.decode(token, memory, padding, caches)[:, -1]
        logits[:, [PAD, BOS, UNK]] = float("-inf")  # never a prediction
        token = logits.argmax(-1, keepdim=True)
        output[rows, step] = token[:, 0]
        going = (token[:, 0] != EOS).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, token, memory, padding = rows[going], token[going], memory[going], padding[going]
            for cache in caches:
                cache.select(going)
    return [_until_end(row) for row in output.tolist()]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
