"""Subwords by byte-pair encoding, learnt and applied by the library ``tokenizers``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The mark before a word, which replaces the space.
WORD_START = "▁"
UNKNOWN = "<unk>"


def learn_bpe(texts: Iterable[str], size: int) -> str:
    """Learns a vocabulary of at most ``size`` subwords.

    Returns:
        The vocabulary and the merges as JSON, which ``tokenizers.Tokenizer.from_str`` reads.

    Reference:
        Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with Subword Units" (ACL).
    """
    tokenizers = _library()
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement=WORD_START)
    # The unknown token is the first entry of the vocabulary, in addition to the subwords.
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size + 1, special_tokens=[UNKNOWN], show_progress=False)
    learnt.train_from_iterator(texts, trainer)
    return learnt.to_str()


def load_bpe(state: str) -> Tokenizer:
    """A tokenizer from the JSON of :func:`learn_bpe`.

    Raises:
        ValueError: If ``state`` is not such JSON.
    """
    library = _library()
    try:
        return library.Tokenizer.from_str(state)
    except Exception as error:  # the library raises no more specific exception
        raise ValueError(f"bpe must be the JSON of a tokenizer, got something else: {error}") from None


def _library():  # type: ignore[no-untyped-def]
    # The library's threads are not faster on short texts, and cause a warning if the process is forked afterwards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers
