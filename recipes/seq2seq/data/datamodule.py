"""Words and pronunciations, or any pairs of short texts, as Lightning loaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from ..tokenizer import NORMALIZATIONS, SPLITS, Tokenizer, check_choice
from .batching import BatchByLength, Row, collate
from .cmudict import load_cmudict
from .examples import (
    Example,
    Splits,
    check_count,
    check_optional_count,
    limit_splits,
    pairs,
    subset,
)
from .tsv import load_tsv

NAMES = ("cmudict", "tsv")


class Seq2SeqData(L.LightningDataModule):
    """Loaders over the CMU Pronouncing Dictionary or tab-separated files.

    A batch is a dict of long tensors, padded with 0: ``source`` (N, S) ends in EOS, ``target_in`` (N, T)
    begins with BOS, ``target_out`` (N, T) ends in EOS. Training has a row for every (source, reference) pair.
    Evaluation has a row for every word, whose targets are those of its first reference, and adds ``sources``
    (the N texts) and ``references`` (for each word a list of tokenised references).

    After ``setup()``: ``splits``, ``source_tokenizer`` and ``target_tokenizer``. The vocabularies come from
    the training split alone, so validation and test words may hold unknown tokens.

    Args:
        name: ``"cmudict"`` or ``"tsv"``.
        batch_size: Pairs in a training batch.
        eval_batch_size: Words in a validation or test batch.
        seed: Chooses the order of the training batches together with the epoch, whatever the global random
            state.
        source_split: ``"characters"`` or ``"spaces"``.
        target_split: ``"characters"`` or ``"spaces"``.
        normalization: ``"NFC"``, ``"NFD"`` (for Korean) or ``"none"``, for both sides.
        limit: Training words to keep, drawn with a fixed seed; validation and test shrink by the same factor.
        train: Training file, with ``name="tsv"``.
        val: Validation file, with ``name="tsv"``.
        test: Test file, with ``name="tsv"``.
        eval_limit: Words ``val_dataloader()`` keeps for quick checks during training, drawn with a fixed
            seed; ``full_val_dataloader()`` always has all.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If an argument has a value that is not allowed.
    """

    splits: Splits
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer

    def __init__(
        self,
        name: str,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        seed: int = 0,
        source_split: str = "characters",
        target_split: str = "spaces",
        normalization: str = "NFC",
        limit: int | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        eval_limit: int | None = None,
    ) -> None:
        super().__init__()
        files = {"train": train, "val": val, "test": test}
        self.files = {key: path for key, path in files.items() if path is not None}
        check_choice("data name", name, NAMES)
        check_choice("source_split", source_split, SPLITS)
        check_choice("target_split", target_split, SPLITS)
        check_choice("normalization", normalization, NORMALIZATIONS)
        _check_files(name, self.files)
        check_count("batch_size", batch_size)
        check_count("eval_batch_size", eval_batch_size)
        check_optional_count("limit", limit)
        check_optional_count("eval_limit", eval_limit)
        self.name = name
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.source_split = source_split
        self.target_split = target_split
        self.normalization = normalization
        self.limit = limit
        self.eval_limit = eval_limit

    def use_tokenizers(self, source: Tokenizer, target: Tokenizer) -> None:
        """Encodes with the tokenizers of a trained model instead of those of the training split."""
        self.source_tokenizer, self.target_tokenizer = source, target

    def setup(self, stage: str | None = None) -> None:
        """Reads the data and fits the tokenizers; a second call changes nothing."""
        if not hasattr(self, "splits"):
            self.splits = self._load()
        if not hasattr(self, "source_tokenizer"):
            sources, targets = zip(*pairs(self.splits.train), strict=True)
            self.source_tokenizer, self.target_tokenizer = (
                Tokenizer.fit(texts, split=split, normalization=self.normalization)
                for texts, split in ((sources, self.source_split), (targets, self.target_split))
            )

    def train_dataloader(self) -> DataLoader[Row]:
        """Every training pair once per epoch, shuffled by (seed, epoch)."""
        self.setup()
        encode_source, encode_target = self.source_tokenizer.encode, self.target_tokenizer.encode
        rows = [Row(encode_source(source), encode_target(target)) for source, target in pairs(self.splits.train)]
        return _loader(rows, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader[Row]:
        """The validation words, at most ``eval_limit``."""
        self.setup()
        return self._eval_dataloader(subset(self.splits.val, self.eval_limit))

    def full_val_dataloader(self) -> DataLoader[Row]:
        """All validation words."""
        self.setup()
        return self._eval_dataloader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Row]:
        """All test words."""
        self.setup()
        return self._eval_dataloader(self.splits.test)

    def _load(self) -> Splits:
        if self.name == "cmudict":
            return load_cmudict(self.limit)
        return limit_splits(load_tsv(**self.files), self.limit)

    def _eval_dataloader(self, examples: Sequence[Example]) -> DataLoader[Row]:
        rows = [
            Row(
                self.source_tokenizer.encode(example.source),
                self.target_tokenizer.encode(example.references[0]),
                example.source,
                [self.target_tokenizer.tokenize(reference) for reference in example.references],
            )
            for example in examples
        ]
        return _loader(rows, self.eval_batch_size, shuffle=False, seed=self.seed)


def _check_files(name: str, files: dict[str, str]) -> None:
    if name == "cmudict" and files:
        raise ValueError(f"data name 'cmudict' takes no files (name 'tsv' does), got {', '.join(files)}")
    if name == "tsv" and len(files) < 3:
        raise ValueError(f"data name 'tsv' needs the files train, val and test, got {', '.join(files) or 'none'}")


def _loader(rows: list[Row], batch_size: int, *, shuffle: bool, seed: int) -> DataLoader[Row]:
    lengths = [(len(row.source_ids), len(row.target_ids)) for row in rows]
    return DataLoader(
        cast(Dataset[Row], rows),
        batch_sampler=BatchByLength(lengths, batch_size, shuffle=shuffle, seed=seed),
        collate_fn=collate,
        # Without a generator of its own every pass would draw from the global one and change dropout.
        generator=torch.Generator(),
    )
