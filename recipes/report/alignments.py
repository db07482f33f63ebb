"""Alignments of source and output by cross-attention, in the format that word aligners read and write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch

from sparse_attn.analysis.alignment import AlignmentRule, align

from ..folders import write_text
from .measure import layer_kind
from .words import ReadWords, in_batches

RULES = {
    "any": "some head gives weight",
    "most": "more than half of the heads give weight",
    "all": "every head gives weight",
    "best": "for each output token, the one source token with the largest mean weight over the heads",
}


def check_alignment(rule: Any, layer: Any, layers: int) -> None:
    """Refuse a rule or a layer that does not exist.

    Raises:
        ValueError: if the rule or the layer is unknown; the message lists the allowed values.
    """
    if rule not in get_args(AlignmentRule):
        raise ValueError(f"align.heads must be one of {', '.join(get_args(AlignmentRule))}, got {rule!r}")
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    if layer != "all" and not (whole and -layers <= layer < layers):
        raise ValueError(f"align.layer must be all or a number from {-layers} to {layers - 1}, got {layer!r}")


def alignment_lines(task: Any, words: list[str], rule: AlignmentRule, layer: int | str, longest: int) -> Iterable[str]:
    """A line ``0-0 1-2 ...`` for each word: pairs of a source token and an output token, both counted from 0.

    An empty word gives a blank line.

    Args:
        task: a `Seq2SeqTask` in evaluation mode.
        words: any number of words.
        rule: how heads are combined; see :func:`sparse_attn.analysis.align`.
        layer: number of the cross-attention layer, counted from the end if negative, or "all" for the heads of all
            layers.
        longest: maximum number of tokens of an input; a longer input is cut.
    """
    batches = in_batches(task, [word for word in words if word], longest)
    lines = iter(line for batch in batches for line in _lines(batch, rule, layer))
    return [next(lines) if word else "" for word in words]


def _lines(batch: ReadWords, rule: AlignmentRule, layer: int | str) -> list[str]:
    cross = [heads.weights for name, heads in batch.record.items() if layer_kind(name) == "cross"]
    chosen = cross if layer == "all" else [cross[int(layer)]]
    weights = torch.cat([each for each in chosen if each is not None], dim=1)
    lines = []
    for index, (source, written) in enumerate(zip(batch.sources, batch.written, strict=True)):
        # The end-of-sequence tokens of both sides are not words.
        pairs = align(weights[index, :, : len(written) - 1, : len(source) - 1], rule).mT.nonzero().tolist()
        lines.append(" ".join(f"{key}-{query}" for key, query in pairs))
    return lines


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Write lines to a text file.

    Raises:
        FileNotFoundError: if the file cannot be written.
    """
    try:
        write_text(file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise FileNotFoundError(f"cannot write the file {str(file)!r}: {error.strerror}") from None
