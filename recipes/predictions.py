"""The predictions of a run for its test words, as a table in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .folders import write_text
from .seq2seq.metrics import closest_references
from .seq2seq.scores import Scores

PREDICTIONS = "test_predictions.tsv"
_COLUMNS = ("prediction", "reference", "distance", "length", "group")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one input, and the closest reference.

    Attributes:
        source: The fields of the input, with tabs between them.
        prediction: The output.
        reference: The closest reference.
        distance: Edit distance between prediction and reference, in tokens.
        length: Tokens of the reference.
        group: The part of the data to which the input belongs, such as a language; empty if the data have no parts.
    """

    source: str
    prediction: str
    reference: str
    distance: int
    length: int
    group: str


def write_predictions(file: Path, scores: Scores, fields: Sequence[str]) -> None:
    """Writes a line with the names of the columns, and one line per input; tabs separate the columns.

    Args:
        file: The output file.
        scores: The scores of a whole split.
        fields: The names of the fields of an input, which are the first columns; ``_COLUMNS`` are the others.
    """
    lines = ["\t".join([*fields, *_COLUMNS])]
    closest = closest_references(scores.predictions, scores.references)
    groups = scores.groups or [""] * len(closest)
    for source, prediction, (distance, reference), group in zip(
        scores.sources, scores.predictions, closest, groups, strict=True
    ):
        # A target that does not come from a column of a file may contain a tab.
        written, wanted = (scores.join(tokens).replace("\t", " ") for tokens in (prediction, reference))
        lines.append("\t".join([source, written, wanted, str(distance), str(len(reference)), group]))
    write_text(file, "\n".join(lines) + "\n")


def read_predictions(file: Path) -> list[Prediction]:
    """Reads the file of :func:`write_predictions`; the result is sorted by input, group and reference.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is not UTF-8 text, has other columns or no prediction, or a line cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise FileNotFoundError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} must be UTF-8 text, got other bytes") from None
    header = lines[0].split("\t")
    if tuple(header[-len(_COLUMNS) :]) != _COLUMNS:
        raise ValueError(f"{file}:1: the last columns must be {', '.join(_COLUMNS)}, got {lines[0]!r}")
    found = []
    width = len(header)
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        parts = line.split("\t")
        *source, prediction, reference, distance, length, group = parts if len(parts) == width else ["", *_COLUMNS]
        if not (distance.isdecimal() and length.isdecimal()):
            raise ValueError(
                f"{file}:{number}: a line must be {'<TAB>'.join(header)}, with whole numbers as distance and length, "
                f"got {line!r}"
            )
        found.append(Prediction("\t".join(source), prediction, reference, int(distance), int(length), group))
    if not found:
        raise ValueError(f"{file} must hold at least one prediction, got only the names of the columns")
    # The reference comes last: for one input, runs may have different closest references. The group comes before
    # the reference, since several groups may have the same input.
    return sorted(found, key=lambda one: (one.source, one.group, one.reference))
