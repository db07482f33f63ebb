"""Text to token ids and back, with a vocabulary learnt from the training split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from .bpe import UNKNOWN, WORD_START, learn_bpe, load_bpe

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
SPLITS = ("characters", "spaces", "bpe")
NORMALIZATIONS = ("NFC", "NFD", "none")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        ValueError: If ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class Tokenizer:
    r"""Splits text into characters, at spaces or into subwords, and numbers the tokens.

    Text is normalised first: with ``split="characters"`` and ``normalization="NFD"``, the letters of a Korean syllable
    and the accent of an accented letter are separate tokens. With ``"characters"``, a space in the text is a token too.

    If a text has several fields, tabs separate them. A ``language`` becomes one token, ``<hun>``; ``features`` become
    one token each, ``[PST]``, at the end of the sequence.

    Args:
        symbols: The tokens seen in training, sorted and distinct; ids 0 to 3 belong to ``SPECIALS``.
        split: ``"characters"``, ``"spaces"`` or ``"bpe"``.
        normalization: ``"NFC"``, ``"NFD"`` or ``"none"``.
        fields: The fields of a text: ``"source"``, and optionally ``"language"`` and ``"features"``.
        feature_split: Separator between two features.
        bpe: The subwords, in the form that ``learn_bpe`` returns, for ``split="bpe"``.

    Raises:
        ValueError: If ``split`` or ``normalization`` is unknown, or ``symbols`` is unsorted, repeats a symbol
            or holds a special token, or ``bpe`` is missing, does not fit ``split`` or cannot be read.

    Example:
        >>> tokenizer = Tokenizer.fit(["bad", "cab"], split="characters", normalization="NFC")
        >>> tokenizer.encode("dab!")
        [7, 4, 5, 3, 2]
        >>> tokenizer.decode([1, 7, 4, 5, 3, 2, 0])
        ['d', 'a', 'b', '<unk>']
        >>> Tokenizer([], split="characters", fields=["language", "source", "features"]).tokenize("deu\tab\tV;PST")
        ['<deu>', 'a', 'b', '[V]', '[PST]']
    """

    def __init__(
        self,
        symbols: Sequence[str],
        *,
        split: str,
        normalization: str = "NFC",
        fields: Sequence[str] = ("source",),
        feature_split: str = ";",
        bpe: str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("normalization", normalization, NORMALIZATIONS)
        if list(symbols) != sorted(set(symbols)):
            raise ValueError("symbols must be sorted and distinct, got them unsorted or repeated")
        if special := sorted(set(symbols) & set(SPECIALS)):
            raise ValueError(f"symbols must not hold the special tokens, got {', '.join(special)}")
        if (bpe is None) == (split == "bpe"):
            found = "no bpe" if bpe is None else "bpe"
            raise ValueError(f"bpe must be given if split is 'bpe', and only then, got {found} and split {split!r}")
        self.symbols = list(symbols)
        self.split = split
        self.normalization = normalization
        self.fields = list(fields)
        self.feature_split = feature_split
        self.bpe = bpe
        self._subwords = load_bpe(bpe) if bpe is not None else None
        self._id_of = {symbol: index for index, symbol in enumerate(self.symbols, start=len(SPECIALS))}

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        *,
        split: str,
        normalization: str,
        fields: Sequence[str] = ("source",),
        feature_split: str = ";",
        bpe_size: int = 10_000,
    ) -> Tokenizer:
        """Learns the symbols of ``texts``: all tokens that occur, or at most ``bpe_size`` subwords.

        A token that looks like a special token, such as ``<unk>``, is not a symbol: it is encoded as unknown.
        """
        options: dict[str, Any] = {"normalization": normalization, "fields": fields, "feature_split": feature_split}
        check_choice("split", split, SPLITS)
        texts = list(texts)
        if split == "bpe":
            plain = cls([], split="spaces", **options)
            options["bpe"] = learn_bpe((plain.text(text) for text in texts), bpe_size)
        empty = cls([], split=split, **options)
        seen = {token for text in texts for token in empty.tokenize(text)}
        if empty._subwords is not None:
            # Keep subwords that occur here only as parts of larger subwords: they may occur in other texts.
            seen |= set(empty._subwords.get_vocab())
        return cls(sorted(seen - set(SPECIALS)), split=split, **options)

    def text(self, text: str) -> str:
        """The source field of a text, normalised and with single spaces, from which subwords are learnt."""
        source = dict(zip(self.fields, text.split("\t"), strict=True))["source"] if len(self.fields) > 1 else text
        return " ".join(self._normalize(source).split())

    def tokenize(self, text: str) -> list[str]:
        """Normalises ``text`` and splits it.

        Raises:
            ValueError: If ``text`` does not have the fields of this tokenizer.
        """
        if len(self.fields) == 1:
            return self._split(self._normalize(text))
        values = text.split("\t")
        if len(values) != len(self.fields):
            raise ValueError(f"a line must be {'<TAB>'.join(self.fields)}, got {text!r}")
        field = dict(zip(self.fields, map(self._normalize, values), strict=True))
        language = [f"<{field['language']}>"] if "language" in field else []
        features = field.get("features", "").split(self.feature_split)
        return [*language, *self._split(field["source"]), *(f"[{name.strip()}]" for name in features if name.strip())]

    def _normalize(self, text: str) -> str:
        if self.normalization == "none":
            return text
        return unicodedata.normalize(cast(Literal["NFC", "NFD"], self.normalization), text)

    def _split(self, text: str) -> list[str]:
        if self._subwords is None:
            return list(text) if self.split == "characters" else text.split()
        text = WORD_START + " ".join(text.split()).replace(" ", WORD_START)
        found = self._subwords.encode(text)
        # A character without a subword stays as a token, since `<unk>` would not show the character.
        return [
            text[begin:end] if token == UNKNOWN else token
            for token, (begin, end) in zip(found.tokens, found.offsets, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` followed by ``EOS``; a token that was not seen in training is ``UNK``."""
        id_of = self._id_of
        return [id_of.get(token, UNK) for token in self.tokenize(text)] + [EOS]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens up to the first ``EOS``; ``PAD`` and ``BOS`` are left out.

        Raises:
            ValueError: If an id is outside the vocabulary.
        """
        tokens = []
        for index in ids:
            if index == EOS:
                break
            if not 0 <= index < len(self):
                raise ValueError(f"token ids must lie in 0..{len(self) - 1}, got {index}")
            if index == UNK:
                tokens.append(SPECIALS[UNK])
            elif index not in (PAD, BOS):
                tokens.append(self.symbols[index - len(SPECIALS)])
        return tokens

    def words(self, tokens: Sequence[str]) -> list[str]:
        """The tokens that scores count: subwords are joined to words, other tokens are not changed."""
        if self._subwords is None:
            return list(tokens)
        return [WORD_START + word for word in self.join(tokens).split()]

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens; decomposed letters are composed again unless ``normalization`` is ``"none"``."""
        text = (" " if self.split == "spaces" else "").join(tokens)
        if self._subwords is not None:
            text = " ".join(text.replace(WORD_START, " ").split())
        return text if self.normalization == "none" else unicodedata.normalize("NFC", text)

    def unknown(self, text: str) -> list[str]:
        """The distinct tokens of ``text`` never seen in training, in order of appearance."""
        return list(dict.fromkeys(token for token in self.tokenize(text) if token not in self._id_of))

    def feature_ids(self) -> list[int]:
        """The ids of the features; none if the texts have no features."""
        if "features" not in self.fields:
            return []
        return [index for symbol, index in self._id_of.items() if re.fullmatch(r"\[.+\]", symbol)]

    def __len__(self) -> int:
        """Size of the vocabulary, including the four special tokens."""
        return len(SPECIALS) + len(self.symbols)

    def state(self) -> dict[str, Any]:
        """Plain strings and lists; ``Tokenizer(**tokenizer.state())`` restores the tokenizer."""
        state: dict[str, Any] = {
            "symbols": list(self.symbols),
            "split": self.split,
            "normalization": self.normalization,
        }
        # Newer settings are added only if they are used. Otherwise, the state is the same as in earlier versions.
        if self.fields != ["source"]:
            state.update(fields=list(self.fields), feature_split=self.feature_split)
        if self.bpe is not None:
            state["bpe"] = self.bpe
        return state

    def __repr__(self) -> str:
        options = f"split={self.split!r}, normalization={self.normalization!r}"
        return f"Tokenizer({len(self.symbols)} symbols, {options})"
