"""Word and phone error rate against one or more references."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def error_rates(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    r"""Word error rate (WER) and phone error rate (PER) in percent.

    With :math:`d_i` the Levenshtein distance from prediction :math:`i` to its closest reference :math:`r_i`,

    .. math:: \mathrm{WER} = \frac{100}{n} \sum_i [d_i > 0], \qquad
              \mathrm{PER} = 100 \, \frac{\sum_i d_i}{\sum_i |r_i|}

    Among equally close references the first one counts.

    Args:
        predictions: One token sequence per word.
        references: One or more accepted token sequences per word, in the same order.

    Returns:
        ``{"wer": ..., "per": ...}``.

    Raises:
        ValueError: If there is no word, the lengths differ, a word has no reference, or all references are
            empty.

    Example:
        >>> error_rates([["K", "AE"], ["D", "AO"]], [[["K", "AE", "T"]], [["D", "AA"], ["D", "AO"]]])
        {'wer': 50.0, 'per': 20.0}
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must be equally many, got {len(predictions)} and {len(references)}"
        )
    if not predictions:
        raise ValueError("predictions must hold at least one word, got none")
    errors = length = wrong = 0
    for index, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if not accepted:
            raise ValueError(f"every word needs at least one reference, got none for word {index}")
        distances = [Levenshtein.distance(prediction, reference) for reference in accepted]
        closest = min(range(len(distances)), key=distances.__getitem__)
        errors += distances[closest]
        length += len(accepted[closest])
        wrong += distances[closest] > 0
    if length == 0:
        raise ValueError("references must hold at least one token in all, got only empty ones")
    return {"wer": 100 * wrong / len(predictions), "per": 100 * errors / length}
