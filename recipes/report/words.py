"""The outputs of a model for some words, and the attention with which the model reads words and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.analysis import AttentionRecord, record_attention

from ..predict import read_words
from ..seq2seq.data.batching import cut, pad
from ..seq2seq.decode import greedy_decode
from ..seq2seq.tokenizer import BOS
from .measure import parts

# Maximum number of tokens of an input, and of an output, that pictures and the page show.
LONGEST_SHOWN = 128


@dataclass(frozen=True)
class ReadWords:
    """Words that a model has read and written, with its attention.

    Attributes:
        words: the given words.
        outputs: the outputs of the model.
        sources: the tokens of each word, followed by ``<eos>``: the keys of cross-attention.
        read: the tokens that the decoder reads, one per step, beginning with ``<bos>``.
        written: the tokens that the decoder generates, one per step, followed by ``<eos>``.
        record: the attention for all words, in one batch.
    """

    words: list[str]
    outputs: list[str]
    sources: list[list[str]]
    read: list[list[str]]
    written: list[list[str]]
    record: AttentionRecord


@torch.no_grad()
def read_batch(task: Any, words: Sequence[str], longest: int = LONGEST_SHOWN) -> ReadWords:
    """Predict the outputs of words, and record the attention of one pass in which the decoder reads these outputs.

    Args:
        task: a `Seq2SeqTask` in evaluation mode.
        words: one word or more.
        longest: maximum number of tokens of an input and of an output; a longer input is cut.

    Raises:
        ValueError: if there is no word, or a word is empty.
    """
    if not words or not all(words):
        raise ValueError(f"words must hold at least one word, none of them empty, got {list(words)!r}")
    device = next(task.model.parameters()).device
    source: Tensor = pad([cut(task.source_tokenizer.encode(word), longest) for word in words]).to(device)
    rows = greedy_decode(task.model, source, max_length=min(longest, task.hparams["max_length"]))
    target = pad([[BOS, *row] for row in rows]).to(device)
    with record_attention(task.model, weights=True) as record:
        task.model(source, target)
    written = [task.target_tokenizer.decode(row) for row in rows]
    return ReadWords(
        words=list(words),
        outputs=[task.target_tokenizer.join(tokens) for tokens in written],
        sources=[[*task.source_tokenizer.tokenize(word)[:longest], "<eos>"] for word in words],
        read=[["<bos>", *tokens] for tokens in written],
        written=[[*tokens, "<eos>"] for tokens in written],
        record=record,
    )


def in_batches(task: Any, words: Sequence[str], longest: int) -> Iterator[ReadWords]:
    """:func:`read_batch` over any number of words."""
    lengths = [min(longest, len(task.source_tokenizer.tokenize(word))) + 1 for word in words]
    for part in parts(lengths):
        yield read_batch(task, words[part], longest)


def given_words(words: Any, word: Any, file: Any, fields: Sequence[str]) -> list[str] | None:
    """The words given to a command; blank lines of a file are empty words. None if no words were given.

    Args:
        words: a list of words, or None.
        word: one word, or None.
        file: a file with one word per line, or None.
        fields: the columns of a line, as the model reads them.

    Raises:
        FileNotFoundError: if the file cannot be read.
        ValueError: if words come from more than one place, or there are none.
    """
    given = {"words": words, "word": word, "input": file}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"only one of words, word and input can be given, got {' and '.join(names)}")
    if file is not None:
        try:
            lines = Path(str(file)).expanduser().read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise FileNotFoundError(f"cannot read the input file {str(file)!r}: {error.strerror}") from None
        found = [text for _, text in read_words(lines, str(file), fields)]
        if not any(found):
            raise ValueError(f"input must hold at least one word, got only blank lines in {str(file)!r}")
        return found
    if words is None and word is None:
        return None
    found = [str(word)] if words is None else ([str(each) for each in words] if not isinstance(words, str) else [words])
    if not found or not all(found):
        if words is None:
            raise ValueError(f"word must hold at least one character, got {str(word)!r}")
        raise ValueError(f"words must hold at least one word, none of them empty, got {found!r}")
    return found
