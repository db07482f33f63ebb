"""Words and pronunciations, or any pairs of texts, as Lightning loaders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from ...folders import write_text
from ..metrics import BLEU_TOKENIZERS, check_metrics
from ..tokenizer import NORMALIZATIONS, SPLITS, Tokenizer, check_choice
from .batching import EVAL_BATCH_TOKENS, BatchByLength, Row, collate, cut
from .cache import Ids, cached_ids
from .cmudict import load_cmudict
from .examples import Example, Splits, check_count, check_optional_count, limit_splits, pairs, subset
from .parallel import SIDE, load_parallel
from .synthetic import make_sequences
from .tsv import ALL_LANGUAGES, LANGUAGE, check_columns, input_fields, load_tsv

NAMES = ("cmudict", "tsv", "parallel", "synthetic")
COLUMNS = ("source", "target")
METRICS_OF_WORDS = ("per", "wer")
# An output may have this number of tokens more than the longest training target: correct outputs may be longer.
EXTRA_LENGTH = 9


class Seq2SeqData(L.LightningDataModule):
    """Loaders over the CMU Pronouncing Dictionary, tab-separated or parallel files, or made-up sequences.

    A batch is a dict of long tensors, padded with 0: ``source`` (N, S) ends in EOS, ``target_in`` (N, T)
    begins with BOS, ``target_out`` (N, T) ends in EOS. Training has a row for every (source, reference) pair.
    Evaluation has a row for every word, whose targets are those of its first reference, and adds ``sources``
    (the N texts), ``references`` (for each word a list of tokenised references) and ``groups`` (the language of
    each word, or another part of the data with separate scores).

    After ``setup()``, the attributes ``splits``, ``source_tokenizer`` and ``target_tokenizer`` exist. The vocabularies
    come only from the training split, so validation and test words may have unknown tokens; ``notes()`` counts them.

    Args:
        name: Kind of the data: ``"cmudict"``, ``"tsv"``, ``"parallel"`` or ``"synthetic"``.
        title: Name of the data in messages and tables; ``name`` if not given.
        train: Training file, for ``"tsv"`` and ``"parallel"``. For ``"parallel"``, the path contains ``{side}``.
        val: Validation file, in the same form.
        test: Test file, in the same form.
        columns: Columns of a tab-separated file, in order: ``source``, ``target`` and optionally ``features``.
        feature_split: Separator between two features.
        languages: Languages of one model, or ``"all"``; the path of each file then contains ``{language}``.
        sides: The texts that replace ``{side}`` in the path of a source file, and of a target file.
        generate: Arguments of ``make_sequences``, with ``name="synthetic"``.
        source_split: How a source becomes tokens: ``"characters"``, ``"spaces"`` or ``"bpe"``.
        target_split: How a target becomes tokens, with the same choices.
        normalization: ``"NFC"``, ``"NFD"`` (for Korean) or ``"none"``, for both sides.
        bpe_size: Largest number of subwords of a side that is split by ``"bpe"``.
        bpe_joint: Whether both sides share their subwords.
        batch_size: Pairs per training batch.
        batch_tokens: Instead of ``batch_size``: maximum number of tokens per batch, padding included, counted for the
            sources or the targets, whichever are longer.
        eval_batch_size: Maximum number of words per validation or test batch.
        eval_batch_tokens: As ``batch_tokens``, for validation and test batches; it applies together with
            ``eval_batch_size``.
        seed: Determines the order of the training batches, together with the epoch; the global random state has no
            effect.
        limit: Number of training words, drawn with a fixed seed; validation and test are reduced by the same factor.
        eval_limit: Number of words in ``val_dataloader()``, for quick checks during training, drawn with a fixed seed;
            ``full_val_dataloader()`` always has all words.
        max_length: Maximum number of tokens of each side: a longer training pair is left out, a longer input is cut.
        output_length: Maximum number of tokens of an output; None: 9 more than the longest training target, since
            correct outputs may be longer.
        cache: A folder for encoded training data, in files named by a hash of texts and tokenizer.
        metrics: The metrics, the most important first; see ``recipes.seq2seq.metrics.METRICS``.
        bleu_tokenize: How sacrebleu splits texts into words: ``"13a"``, ``"intl"``, ``"char"``, ``"zh"``, or ``"none"``
            for texts that are already split.

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
        title: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        columns: list[str] | None = None,
        feature_split: str = ";",
        languages: list[str] | str | None = None,
        sides: list[str] | None = None,
        generate: dict[str, Any] | None = None,
        source_split: str = "characters",
        target_split: str = "spaces",
        normalization: str = "NFC",
        bpe_size: int = 10_000,
        bpe_joint: bool = True,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        eval_batch_size: int = 512,
        eval_batch_tokens: int = EVAL_BATCH_TOKENS,
        seed: int = 0,
        limit: int | None = None,
        eval_limit: int | None = None,
        max_length: int = 1000,
        output_length: int | None = None,
        cache: str | None = None,
        metrics: list[str] | None = None,
        bleu_tokenize: str = "13a",
    ) -> None:
        super().__init__()
        files = {"train": train, "val": val, "test": test}
        self.files = {key: path for key, path in files.items() if path is not None}
        check_choice("data name", name, NAMES)
        check_choice("source_split", source_split, SPLITS)
        check_choice("target_split", target_split, SPLITS)
        check_choice("normalization", normalization, NORMALIZATIONS)
        if isinstance(languages, str) and languages != ALL_LANGUAGES:
            languages = [languages]
        only = {"columns": columns, "languages": languages, "sides": sides, "generate": generate}
        _check_source(name, self.files, {key: value for key, value in only.items() if value is not None})
        counts = {
            "bpe_size": bpe_size,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "eval_batch_tokens": eval_batch_tokens,
            "max_length": max_length,
        }
        for key, value in counts.items():
            check_count(key, value)
        for key, count in {
            "limit": limit,
            "eval_limit": eval_limit,
            "batch_tokens": batch_tokens,
            "output_length": output_length,
        }.items():
            check_optional_count(key, count)
        metrics = list(METRICS_OF_WORDS) if metrics is None else metrics
        check_metrics(metrics, target_split)
        check_choice("bleu_tokenize", bleu_tokenize, BLEU_TOKENIZERS)
        if not feature_split:
            raise ValueError("feature_split must hold at least one character, got ''")
        self.name = name
        self.title = title or name
        self.columns = columns or list(COLUMNS)
        self.feature_split = feature_split
        self.languages = languages
        self.sides = sides or list(COLUMNS)
        self.generate = generate or {}
        self.source_split = source_split
        self.target_split = target_split
        self.normalization = normalization
        self.bpe_size = bpe_size
        self.bpe_joint = bpe_joint
        self.batch_size = None if batch_tokens is not None else batch_size
        self.batch_tokens = batch_tokens
        self.eval_batch_size = eval_batch_size
        self.eval_batch_tokens = eval_batch_tokens
        self.seed = seed
        self.limit = limit
        self.eval_limit = eval_limit
        self.max_length = max_length
        self.output_length = output_length
        self.cache = cache
        self.metrics = metrics
        self.bleu_tokenize = bleu_tokenize
        self._rows: dict[str, list[Row]] = {}
        self._left_out = 0

    def use_tokenizers(self, source: Tokenizer, target: Tokenizer) -> None:
        """Encodes with the tokenizers of a trained model instead of those of the training split."""
        self.source_tokenizer, self.target_tokenizer = source, target

    def setup(self, stage: str | None = None) -> None:
        """Reads the data and fits the tokenizers; a second call changes nothing."""
        if not hasattr(self, "splits"):
            self.splits = limit_splits(self._load(), self.limit)
        if not hasattr(self, "source_tokenizer"):
            self.source_tokenizer, self.target_tokenizer = self._fit_tokenizers()

    def train_dataloader(self) -> DataLoader[Row]:
        """Every training pair once per epoch, shuffled by (seed, epoch)."""
        return self._loader(self._train_rows(), self.batch_size, self.batch_tokens, shuffle=True)

    def val_dataloader(self) -> DataLoader[Row]:
        """The validation words, at most ``eval_limit``."""
        return self._eval_loader(subset(self._eval_rows("val"), self.eval_limit))

    def full_val_dataloader(self, count: int | None = None) -> DataLoader[Row]:
        """All validation words, or ``count`` of them, drawn with a fixed seed."""
        return self._eval_loader(subset(self._eval_rows("val"), count))

    def test_dataloader(self) -> DataLoader[Row]:
        """All test words."""
        return self._eval_loader(self._eval_rows("test"))

    def longest_output(self) -> int:
        """The largest number of tokens of an output, without the end-of-sequence token."""
        if self.output_length is not None:
            return self.output_length
        return max(len(row.target_ids) - 1 for row in self._train_rows()) + EXTRA_LENGTH

    def notes(self) -> list[str]:
        """Messages for the user before training: pairs left out, inputs cut off, symbols never seen."""
        self._train_rows()
        notes = []
        if self._left_out:
            notes.append(
                f"{self._left_out:,} of {self._left_out + len(self._rows['train']):,} training pairs have more than "
                f"{self.max_length} tokens on a side and are left out (data.max_length)"
            )
        return [*notes, *self.notes_of("val"), *self.notes_of("test")]

    def notes_of(self, split: str) -> list[str]:
        """Messages on the ``"val"`` or ``"test"`` split: inputs cut off, symbols never seen in training."""
        name = {"val": "validation", "test": "test"}[split]
        examples: list[Example] = getattr(self.splits, split)
        long = sum(len(self.source_tokenizer.tokenize(example.source)) > self.max_length for example in examples)
        notes = []
        if long:
            notes.append(
                f"{long:,} of {len(examples):,} {name} inputs have more than {self.max_length} tokens and are cut "
                "off (data.max_length)"
            )
        notes += unseen_symbols(self.source_tokenizer, [example.source for example in examples], f"{name} inputs")
        targets = [example.references[0] for example in examples]
        return notes + unseen_symbols(self.target_tokenizer, targets, f"{name} targets")

    def save_vocabularies(self, folder: Path) -> None:
        """Writes the subwords of each side as ``bpe_SIDE.json``, which ``tokenizers.Tokenizer.from_file`` reads."""
        for side, tokenizer in {"source": self.source_tokenizer, "target": self.target_tokenizer}.items():
            if tokenizer.bpe is not None:
                content = json.dumps(json.loads(tokenizer.bpe), ensure_ascii=False, indent=1)
                write_text(folder / f"bpe_{side}.json", content)

    def _load(self) -> Splits:
        if self.name == "cmudict":
            return load_cmudict()
        if self.name == "parallel":
            return load_parallel(**self.files, sides=self.sides)
        if self.name == "synthetic":
            return make_sequences(**self.generate)
        return load_tsv(**self.files, columns=self.columns, languages=self.languages)

    def _fit_tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        sources, targets = (list(texts) for texts in zip(*pairs(self.splits.train), strict=True))
        common: dict[str, Any] = {"normalization": self.normalization, "bpe_size": self.bpe_size}
        fields = input_fields(self.columns, languages=self.languages is not None)
        if self.bpe_joint and self.source_split == self.target_split == "bpe" and fields == ["source"]:
            tokenizer = Tokenizer.fit([*sources, *targets], split="bpe", **common)
            return tokenizer, tokenizer
        return (
            Tokenizer.fit(sources, split=self.source_split, fields=fields, feature_split=self.feature_split, **common),
            Tokenizer.fit(targets, split=self.target_split, **common),
        )

    def _train_rows(self) -> list[Row]:
        if "train" not in self._rows:
            self.setup()
            sources, targets = zip(*pairs(self.splits.train), strict=True)
            encoded = [
                self._encode(tokenizer, texts)
                for tokenizer, texts in ((self.source_tokenizer, sources), (self.target_tokenizer, targets))
            ]
            rows = [Row(source, target) for source, target in zip(*encoded, strict=True)]
            short = [row for row in rows if max(len(row.source_ids), len(row.target_ids)) <= self.max_length + 1]
            if not short:
                raise ValueError(
                    f"max_length must leave at least one training pair, got {self.max_length} tokens "
                    f"where the shortest has {min(max(len(row[0]), len(row[1])) - 1 for row in rows)}"
                )
            self._rows["train"], self._left_out = short, len(rows) - len(short)
        return self._rows["train"]

    def _encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
        parts = [] if self.cache is None else [json.dumps(tokenizer.state()), *texts]
        return cached_ids(self.cache, parts, lambda: [tokenizer.encode(text) for text in texts])

    def _eval_rows(self, split: str) -> list[Row]:
        if split not in self._rows:
            self.setup()
            self._rows[split] = [self._eval_row(example) for example in getattr(self.splits, split)]
        return self._rows[split]

    def _eval_row(self, example: Example) -> Row:
        source, target = self.source_tokenizer, self.target_tokenizer
        references = [target.words(target.tokenize(reference)) for reference in example.references]
        return Row(
            # Long inputs are cut, since the time for attention grows with the square of the length.
            cut(source.encode(example.source), self.max_length),
            cut(target.encode(example.references[0]), self.max_length),
            example.source,
            references,
            example.group,
        )

    def _eval_loader(self, rows: list[Row]) -> DataLoader[Row]:
        return self._loader(rows, self.eval_batch_size, self.eval_batch_tokens, shuffle=False)

    def _loader(
        self, rows: list[Row], batch_size: int | None, batch_tokens: int | None, *, shuffle: bool
    ) -> DataLoader[Row]:
        lengths = [(len(row.source_ids), len(row.target_ids)) for row in rows]
        return DataLoader(
            cast(Dataset[Row], rows),
            batch_sampler=BatchByLength(
                lengths, batch_size, batch_tokens=batch_tokens, shuffle=shuffle, seed=self.seed
            ),
            collate_fn=collate,
            # Without its own generator, the loader would use the global generator in every pass and change dropout.
            generator=torch.Generator(),
        )


def _check_source(name: str, files: dict[str, str], given: dict[str, Any]) -> None:
    """Refuses arguments that are not for this kind of data."""
    for_name = {"columns": "tsv", "languages": "tsv", "sides": "parallel", "generate": "synthetic"}
    for key in given:
        if for_name[key] != name:
            raise ValueError(f"{key} is for data name {for_name[key]!r}, got it with {name!r}")
    if name in ("cmudict", "synthetic") and files:
        raise ValueError(f"data name {name!r} takes no files (name 'tsv' does), got {', '.join(files)}")
    if name in ("tsv", "parallel") and len(files) < 3:
        raise ValueError(f"data name {name!r} needs the files train, val and test, got {', '.join(files) or 'none'}")
    if name == "synthetic" and "task" not in given.get("generate", {}):
        raise ValueError(f"data name 'synthetic' needs generate.task, got {given.get('generate')}")
    for split, path in files.items():
        if not path:
            raise ValueError(f"{split} must be a file, got ''")
        if name == "tsv" and LANGUAGE in path and "languages" not in given:
            raise ValueError(f"languages must be given, since {split} holds {LANGUAGE}, got no languages and {path!r}")
    check_columns(given.get("columns", COLUMNS))
    needed = {"languages": LANGUAGE} if "languages" in given else {"sides": SIDE} if name == "parallel" else {}
    for key, placeholder in needed.items():
        for split, path in files.items():
            if placeholder not in path:
                raise ValueError(f"{split} must hold {placeholder} in its path, which {key} fills in, got {path!r}")
    _check_names("languages", given.get("languages"), 1)
    _check_names("sides", given.get("sides"), 2)


def _check_names(key: str, names: Any, fewest: int) -> None:
    if names is None or names == ALL_LANGUAGES:
        return
    if len(names) < fewest or len(set(names)) < len(names) or (key == "sides" and len(names) > fewest):
        wanted = "two different names" if key == "sides" else "at least one language, and each once"
        raise ValueError(f"{key} must hold {wanted}, got [{', '.join(map(str, names))}]")
    for name in names:
        if not isinstance(name, str) or not name or any(character in name for character in "\t/{}"):
            raise ValueError(f"{key} must hold names as they occur in file names, got {name!r}")
        if key == "languages" and name in ("pad", "bos", "eos", "unk"):
            raise ValueError(f"languages must not be one of pad, bos, eos, unk, got {name!r}")


def unseen_symbols(tokenizer: Tokenizer, texts: Sequence[str], name: str) -> list[str]:
    """A line with the number of texts that contain symbols not in the training data; no line if there are none."""
    found = [symbols for text in texts if (symbols := tokenizer.unknown(text))]
    if not found:
        return []
    symbols = list(dict.fromkeys(symbol for row in found for symbol in row))
    shown = ", ".join(f'"{symbol}"' if symbol.isprintable() else ascii(symbol) for symbol in symbols[:5])
    more = f" and {len(symbols) - 5} more" if len(symbols) > 5 else ""
    return [f"{len(found):,} of {len(texts):,} {name} hold symbols never seen in training: {shown}{more}"]
