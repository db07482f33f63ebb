"""Text to token ids and back, with a vocabulary learnt from the training split."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
SPLITS = ("characters", "spaces")
NORMALIZATIONS = ("NFC", "NFD", "none")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        ValueError: If ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class Tokenizer:
    """Splits text into characters or at spaces and numbers the tokens.

    Text is normalised first, so that ``split="characters"`` with ``normalization="NFD"`` sees the letters of
    a Korean syllable and the accent of an accented letter as tokens of their own. With ``"characters"`` a
    space inside the text is a token like any other.

    Args:
        symbols: The tokens seen in training, sorted and distinct; ids 0 to 3 belong to ``SPECIALS``.
        split: ``"characters"`` or ``"spaces"``.
        normalization: ``"NFC"``, ``"NFD"`` or ``"none"``.

    Raises:
        ValueError: If ``split`` or ``normalization`` is unknown, or ``symbols`` is unsorted, repeats a symbol
            or holds a special one.

    Example:
        >>> tokenizer = Tokenizer.fit(["bad", "cab"], split="characters", normalization="NFC")
        >>> tokenizer.encode("dab!")
        [7, 4, 5, 3, 2]
        >>> tokenizer.decode([1, 7, 4, 5, 3, 2, 0])
        ['d', 'a', 'b', '<unk>']
    """

    def __init__(self, symbols: Sequence[str], *, split: str, normalization: str = "NFC") -> None:
        check_choice("split", split, SPLITS)
        check_choice("normalization", normalization, NORMALIZATIONS)
        if list(symbols) != sorted(set(symbols)):
            raise ValueError("symbols must be sorted and distinct, got them unsorted or repeated")
        if special := sorted(set(symbols) & set(SPECIALS)):
            raise ValueError(f"symbols must not hold the special tokens, got {', '.join(special)}")
        self.symbols = list(symbols)
        self.split = split
        self.normalization = normalization
        self._id_of = {symbol: index for index, symbol in enumerate(self.symbols, start=len(SPECIALS))}

    @classmethod
    def fit(cls, texts: Iterable[str], *, split: str, normalization: str) -> Tokenizer:
        """Learns the symbols of ``texts``.

        Text that spells a special token (``<unk>``) is not a symbol: it is encoded as unknown.
        """
        empty = cls([], split=split, normalization=normalization)
        seen = {token for text in texts for token in empty.tokenize(text)}
        return cls(sorted(seen - set(SPECIALS)), split=split, normalization=normalization)

    def tokenize(self, text: str) -> list[str]:
        """Normalises ``text`` and splits it."""
        if self.normalization != "none":
            text = unicodedata.normalize(cast(Literal["NFC", "NFD"], self.normalization), text)
        return list(text) if self.split == "characters" else text.split()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text`` followed by ``EOS``; a token never seen is ``UNK``."""
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

    def join(self, tokens: Sequence[str]) -> str:
        """Tokens as text; decomposed letters are joined again unless ``normalization`` is ``"none"``."""
        text = ("" if self.split == "characters" else " ").join(tokens)
        return text if self.normalization == "none" else unicodedata.normalize("NFC", text)

    def unknown(self, text: str) -> list[str]:
        """The distinct tokens of ``text`` never seen in training, in order of appearance."""
        return list(dict.fromkeys(token for token in self.tokenize(text) if token not in self._id_of))

    def __len__(self) -> int:
        """Size of the vocabulary, the four special tokens included."""
        return len(SPECIALS) + len(self.symbols)

    def state(self) -> dict[str, Any]:
        """Plain strings and lists; ``Tokenizer(**tokenizer.state())`` restores the tokenizer."""
        return {"symbols": list(self.symbols), "split": self.split, "normalization": self.normalization}

    def __repr__(self) -> str:
        options = f"split={self.split!r}, normalization={self.normalization!r}"
        return f"Tokenizer({len(self.symbols)} symbols, {options})"
