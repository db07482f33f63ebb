"""The accuracy of inputs with features, by what the training data contain of them: source, features, both, neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from ..seq2seq.scores import Scores
from .tables import SPLIT_NAMES

PARTS = {
    "known_both": "source and features known",
    "known_source": "only the source known",
    "known_features": "only the features known",
    "known_neither": "neither known",
}


class Part(NamedTuple):
    """The number of inputs, and the share of correct outputs in percent."""

    words: int
    accuracy: float


def overlap(scores: Scores, fields: Sequence[str], training: Iterable[str]) -> dict[str, Part]:
    r"""The accuracy of four parts of the inputs; a part without inputs is left out.

    A source text, or a combination of features, is known if it occurs in a training input. With several languages, only
    training inputs of the same language count.

    Args:
        scores: The inputs, with their predictions and references.
        fields: The names of the fields of an input, with ``source`` and ``features``.
        training: The training inputs.

    Returns:
        The parts by the keys of ``PARTS``.

    Example:
        >>> scores = Scores(sources=["ab\tV", "ab\tN"], predictions=[["x"], ["x"]], references=[[["x"]], [["y"]]])
        >>> parts = overlap(scores, ["source", "features"], ["ab\tV", "d\tV"])
        >>> parts["known_both"], parts["known_source"], len(parts)
        (Part(words=1, accuracy=100.0), Part(words=1, accuracy=0.0), 2)

    Reference:
        Kodner et al. 2022, "SIGMORPHON-UniMorph 2022 Shared Task 0" (SIGMORPHON), which scores these parts separately.
    """
    known: dict[str, set[tuple[str, str]]] = {"source": set(), "features": set()}
    for text in training:
        for name, value in _named(text, fields).items():
            known[name].add(value)
    correct: dict[str, list[bool]] = {part: [] for part in PARTS}
    for text, prediction, references in zip(scores.sources, scores.predictions, scores.references, strict=True):
        found = [name for name, value in _named(text, fields).items() if value in known[name]]
        part = {0: "neither", 2: "both"}.get(len(found)) or found[0]
        correct[f"known_{part}"].append(prediction in references)
    return {part: Part(len(right), 100 * sum(right) / len(right)) for part, right in correct.items() if right}


def overlap_table(found: Mapping[str, Mapping[str, Part]]) -> Table:
    """A line for each part, with its accuracy and its number of inputs in each split.

    Args:
        found: ``"val"`` or ``"test"`` -> the result of :func:`overlap`.
    """
    title = "accuracy by what the training data contain"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for split in found:
        table.add_column(f"{SPLIT_NAMES[split]} %", justify="right")
        table.add_column("words", justify="right")
    for part, label in PARTS.items():
        if any(part in parts for parts in found.values()):
            cells = [
                (f"{p[part].accuracy:.2f}", f"{p[part].words:,}") if part in p else ("-", "0") for p in found.values()
            ]
            table.add_row(label, *(cell for pair in cells for cell in pair))
    return table


def _named(text: str, fields: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The source and the features of an input, each with the language, which is empty if inputs do not name it."""
    field = dict(zip(fields, text.split("\t"), strict=True))
    return {name: (field.get("language", ""), field[name]) for name in ("source", "features")}
