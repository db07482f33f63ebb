"""Scores of outputs against one or more references: edit distances by rapidfuzz, BLEU and chrF by sacrebleu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

Tokens = Sequence[str]


@dataclass(frozen=True)
class Metric:
    """The label of a metric, and whether higher or lower values are better."""

    label: str
    higher_is_better: bool = False


EDIT_METRICS = {
    "per": Metric("PER %"),
    "wer": Metric("WER %"),
    "accuracy": Metric("accuracy %", higher_is_better=True),
    "edit_distance": Metric("edit distance"),
}
TEXT_METRICS = {"bleu": Metric("BLEU", higher_is_better=True), "chrf": Metric("chrF", higher_is_better=True)}
METRICS = {**EDIT_METRICS, **TEXT_METRICS}
# Scores that are computed under teacher forcing.
MEANS = {"loss": Metric("loss"), "support": Metric("support")}
BLEU_TOKENIZERS = ("13a", "none", "intl", "char", "zh")


def check_metrics(names: Sequence[str], target_split: str) -> None:
    """Refuses metrics that are unknown, repeated, or do not fit how the target is split.

    Raises:
        ValueError: If a metric is not allowed.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {unknown[0]!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics must hold at least one metric, and each once, got [{', '.join(names)}]")
    if target_split == "characters" and (text := [name for name in names if name in TEXT_METRICS]):
        raise ValueError(
            f"{text[0]} does not fit data.target_split=characters: it scores texts of several words; "
            f"allowed there: {', '.join(EDIT_METRICS)}"
        )


def computed(names: Sequence[str]) -> list[str]:
    """The metrics that are computed together with the requested ones: all edit metrics, or both text metrics.

    Example:
        >>> computed(["bleu"])
        ['bleu', 'chrf']
    """
    families = (family for family in (EDIT_METRICS, TEXT_METRICS) if set(names) & set(family))
    return [name for family in families for name in family]


def closest_references(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> list[tuple[int, Tokens]]:
    """For every prediction, the Levenshtein distance to its closest reference, and this reference.

    Among equally close references, the first one is used.

    Raises:
        ValueError: If there is no word, the lengths differ, or a word has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must be equally many, got {len(predictions)} and {len(references)}"
        )
    if not predictions:
        raise ValueError("predictions must hold at least one word, got none")
    found = []
    for index, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if not accepted:
            raise ValueError(f"every word needs at least one reference, got none for word {index}")
        distances = [Levenshtein.distance(prediction, reference) for reference in accepted]
        closest = min(range(len(distances)), key=distances.__getitem__)
        found.append((distances[closest], accepted[closest]))
    return found


def edit_scores(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    r"""Phone and word error rate, accuracy and mean edit distance.

    With :math:`d_i` the Levenshtein distance from prediction :math:`i` to its closest reference :math:`r_i`,

    .. math:: \mathrm{WER} = \frac{100}{n} \sum_i [d_i > 0], \qquad
              \mathrm{PER} = 100 \, \frac{\sum_i d_i}{\sum_i |r_i|}

    The accuracy is :math:`100 - \mathrm{WER}`, the mean edit distance :math:`\frac{1}{n} \sum_i d_i`. Here "word" means
    a whole output and "phone" one token, for every kind of data.

    Args:
        predictions: One token sequence per word.
        references: One or more accepted token sequences per word, in the same order.

    Returns:
        ``{"per": ..., "wer": ..., "accuracy": ..., "edit_distance": ...}``, the first three in percent.

    Raises:
        ValueError: If there is no word, the lengths differ, a word has no reference, or all references are
            empty.

    Example:
        >>> edit_scores([["K", "AE"], ["D", "AO"]], [[["K", "AE", "T"]], [["D", "AA"], ["D", "AO"]]])
        {'per': 20.0, 'wer': 50.0, 'accuracy': 50.0, 'edit_distance': 0.5}
    """
    counts = closest_references(predictions, references)
    words, errors, length = len(counts), sum(d for d, _ in counts), sum(len(r) for _, r in counts)
    if length == 0:
        raise ValueError("references must hold at least one token in all, got only empty ones")
    wrong = sum(distance > 0 for distance, _ in counts)
    return {
        "per": 100 * errors / length,
        "wer": 100 * wrong / words,
        "accuracy": 100 * (words - wrong) / words,
        "edit_distance": errors / words,
    }


def error_rates(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Only the word and phone error rates of :func:`edit_scores`, in percent.

    Example:
        >>> error_rates([["K", "AE"], ["D", "AO"]], [[["K", "AE", "T"]], [["D", "AA"], ["D", "AO"]]])
        {'wer': 50.0, 'per': 20.0}
    """
    scores = edit_scores(predictions, references)
    return {name: scores[name] for name in ("wer", "per")}


def text_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, bleu_tokenize: str = "13a"
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU and chrF of whole texts.

    Args:
        predictions: One text per input.
        references: One or more accepted texts per input, in the same order.
        bleu_tokenize: How sacrebleu splits texts into words: ``"13a"``, or ``"none"`` for texts that are already split.

    Returns:
        ``{"bleu": ..., "chrf": ...}``, and sacrebleu's signature of each, which describes the computation.

    Raises:
        ValueError: If there is no text or the lengths differ.

    Example:
        >>> scores, signatures = text_scores(["the cat sat on the mat"], [["the cat sat on a mat"]])
        >>> f"{scores['bleu']:.2f} {scores['chrf']:.2f}", signatures["bleu"][:17]
        ('53.73 72.08', 'nrefs:1|case:mixe')

    Reference:
        Post 2018, "A Call for Clarity in Reporting BLEU Scores" (WMT); Popović 2015, "chrF" (WMT).
    """
    # Imported here, because only some data need sacrebleu.
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"predictions and references must be equally many, and not none, got {len(predictions)} and "
            f"{len(references)}"
        )
    most = max(map(len, references))
    # Stream `rank` contains the reference with this index of every input, or None if the input has fewer references.
    streams: list[Any] = [[texts[rank] if rank < len(texts) else None for texts in references] for rank in range(most)]
    scorers = {"bleu": BLEU(tokenize=bleu_tokenize, force=True), "chrf": CHRF()}
    scores = {name: float(scorer.corpus_score(list(predictions), streams).score) for name, scorer in scorers.items()}
    return scores, {name: str(scorer.get_signature()) for name, scorer in scorers.items()}


def by_group(
    score: Callable[[Sequence[int]], dict[str, float]], groups: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores of parts of the data, and their means over the parts (macro averages).

    Args:
        score: A function from the indices of some inputs to their scores.
        groups: The part to which each input belongs.

    Returns:
        The scores of all inputs (with several parts, the means over the parts), and the scores of each part (empty if
        there is only one part).

    Example:
        >>> by_group(lambda chosen: {"size": float(len(chosen))}, ["hun", "jpn", "hun"])
        ({'size': 1.5}, {'hun': {'size': 2.0}, 'jpn': {'size': 1.0}})
    """
    parts: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(group, []).append(index)
    if len(parts) < 2:
        return score(range(len(groups))), {}
    each = {group: score(chosen) for group, chosen in sorted(parts.items(), key=lambda part: (len(part[0]), part[0]))}
    names = next(iter(each.values()))
    return {name: sum(scores[name] for scores in each.values()) / len(each) for name in names}, each
