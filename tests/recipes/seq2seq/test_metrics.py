import random

import pytest
from torchmetrics.text import WordErrorRate

from recipes.seq2seq.metrics import error_rates


@pytest.mark.parametrize(
    ("prediction", "reference", "distance"),
    [
        ("k i t t e n", "s i t t i n g", 3),
        ("a b", "b a", 2),  # a swap is two edits: Levenshtein, not Damerau
        ("a", "a b c", 2),
        ("a b c", "c", 2),
        ("", "a b", 2),
        ("t͡s a", "t s a", 2),  # tokens are compared whole
    ],
)
def test_distances_counted_by_hand(prediction, reference, distance):
    reference = reference.split()
    rates = error_rates([prediction.split()], [[reference]])
    assert rates == {"wer": 100.0, "per": 100 * distance / len(reference)}


def test_all_right_is_zero():
    words = [["a"], ["b", "c"]]
    assert error_rates(words, [[word] for word in words]) == {"wer": 0.0, "per": 0.0}


def test_closed_form_of_the_last_token_wrong():
    """Word i has i tokens and only its last is wrong: PER is 100 n / (n (n + 1) / 2)."""
    n = 13
    references = [[[str(place) for place in range(length)]] for length in range(1, n + 1)]
    predictions = [[*reference[0][:-1], "wrong"] for reference in references]
    rates = error_rates(predictions, references)
    assert rates["wer"] == 100.0
    assert rates["per"] == pytest.approx(200 / (n + 1))


def test_per_is_averaged_over_tokens_and_not_over_words():
    rates = error_rates([["x"], list("abcdefghi")], [[["a"]], [list("abcdefghi")]])
    assert rates == {"wer": 50.0, "per": 10.0}


def test_more_errors_than_tokens_exceed_a_hundred_percent():
    assert error_rates([list("abcde")], [[["x", "y"]]])["per"] == 250.0


def test_the_closest_reference_counts():
    references = [[["D", "AA", "G"], ["D", "AO", "G", "Z"], ["D", "AO", "G"]]]
    assert error_rates([["D", "AO", "G"]], references) == {"wer": 0.0, "per": 0.0}
    assert error_rates([["a", "b", "c", "x"]], [[["a", "b"], ["a", "b", "c", "d"]]])["per"] == 25.0


def test_of_equally_close_references_the_first_gives_the_length():
    short, long = ["a", "b"], ["a", "b", "c", "d"]
    assert error_rates([["a", "b", "c"]], [[short, long]])["per"] == 50.0
    assert error_rates([["a", "b", "c"]], [[long, short]])["per"] == 25.0


@pytest.mark.parametrize("seed", range(3))
def test_per_agrees_with_torchmetrics(seed):
    """Error rate over tokens is torchmetrics' error rate over the words of a sentence."""
    rng = random.Random(seed)
    texts = [[" ".join(rng.choices("abcd", k=rng.randint(1, 11))) for _ in range(53)] for _ in range(2)]
    predictions, references = ([text.split() for text in side] for side in texts)
    expected = 100 * WordErrorRate()(*texts).item()
    assert error_rates(predictions, [[reference] for reference in references])["per"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_wer_agrees_with_torchmetrics_on_words_as_single_tokens(seed):
    rng = random.Random(seed)
    predictions, references = ([rng.choices("ab", k=3) for _ in range(47)] for _ in range(2))
    expected = 100 * WordErrorRate()(*(["".join(word) for word in side] for side in (predictions, references)))
    assert error_rates(predictions, [[word] for word in references])["wer"] == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([["a"]], [], "predictions and references must be equally many, got 1 and 0"),
        ([], [], "predictions must hold at least one word, got none"),
        ([["a"], ["b"]], [[["a"]], []], "every word needs at least one reference, got none for word 1"),
        ([["a"]], [[[]]], "references must hold at least one token in all, got only empty ones"),
    ],
)
def test_wrong_input_is_named(predictions, references, message):
    with pytest.raises(ValueError) as error:
        error_rates(predictions, references)
    assert str(error.value) == message
