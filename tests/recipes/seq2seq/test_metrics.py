import random

import pytest
from torchmetrics.text import WordErrorRate

from recipes.seq2seq.metrics import by_group, check_metrics, edit_scores, error_rates, text_scores


@pytest.mark.parametrize(
    ("prediction", "reference", "distance"),
    [
        ("k i t t e n", "s i t t i n g", 3),
        ("a b", "b a", 2),  # a swap is two edits: Levenshtein, not Damerau
        ("a", "a b c", 2),
        ("a b c", "c", 2),
        ("", "a b", 2),
        ("t͡s a", "t s a", 2),  # whole tokens are compared
    ],
)
def test_error_rates_agree_with_distances_counted_by_hand(prediction, reference, distance):
    reference = reference.split()
    rates = error_rates([prediction.split()], [[reference]])
    assert rates == {"wer": 100.0, "per": 100 * distance / len(reference)}


def test_correct_predictions_have_no_errors():
    words = [["a"], ["b", "c"]]
    assert error_rates(words, [[word] for word in words]) == {"wer": 0.0, "per": 0.0}


def test_per_counts_one_wrong_token_of_each_word():
    """Word `i` of `n` has `i` tokens, and only the last token is wrong: PER is 100 n / (n (n + 1) / 2)."""
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


def test_the_closest_reference_is_used():
    references = [[["D", "AA", "G"], ["D", "AO", "G", "Z"], ["D", "AO", "G"]]]
    assert error_rates([["D", "AO", "G"]], references) == {"wer": 0.0, "per": 0.0}
    assert error_rates([["a", "b", "c", "x"]], [[["a", "b"], ["a", "b", "c", "d"]]])["per"] == 25.0


def test_of_equally_close_references_the_first_gives_the_length():
    short, long = ["a", "b"], ["a", "b", "c", "d"]
    assert error_rates([["a", "b", "c"]], [[short, long]])["per"] == 50.0
    assert error_rates([["a", "b", "c"]], [[long, short]])["per"] == 25.0


@pytest.mark.parametrize("seed", range(3))
def test_per_agrees_with_torchmetrics(seed):
    """The error rate over tokens equals torchmetrics' error rate over the words of a sentence."""
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
def test_invalid_input_raises_an_error(predictions, references, message):
    with pytest.raises(ValueError) as error:
        error_rates(predictions, references)
    assert str(error.value) == message


def test_edit_scores_agree_with_values_computed_by_hand():
    scores = edit_scores([["a"], ["b", "c"], []], [[["a"]], [["b"]], [["d", "e", "f"]]])
    assert scores == {
        "per": pytest.approx(100 * 4 / 5),
        "wer": pytest.approx(200 / 3),
        "accuracy": pytest.approx(100 / 3),
        "edit_distance": pytest.approx(4 / 3),
    }


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["the cat sat on the mat today", "a dog, there!"]
    references = [["the cat sat on a mat today", "today a cat sat on the mat"], ["a dog is there!"]]
    for tokenize in ("13a", "none"):
        scores, signatures = text_scores(predictions, references, bleu_tokenize=tokenize)
        streams = [[texts[0] for texts in references], ["today a cat sat on the mat", None]]
        assert scores["bleu"] == sacrebleu.metrics.BLEU(tokenize=tokenize).corpus_score(predictions, streams).score
        assert scores["chrf"] == sacrebleu.metrics.CHRF().corpus_score(predictions, streams).score
        assert f"tok:{tokenize}|" in signatures["bleu"] and "nrefs:var" in signatures["bleu"]


def test_different_numbers_of_texts_are_refused():
    pytest.importorskip("sacrebleu")
    with pytest.raises(
        ValueError, match=r"^predictions and references must be equally many, and not none, got 1 and 0$"
    ):
        text_scores(["a"], [])


def test_groups_are_averaged_and_ordered_by_length_and_name():
    def share(chosen):
        return {"share": len(chosen) / 10}

    assert by_group(share, ["x16", "x2", "x2"]) == (
        {"share": pytest.approx(0.15)},
        {"x2": {"share": 0.2}, "x16": {"share": 0.1}},
    )
    assert list(by_group(share, ["x16", "x2", "x2"])[1]) == ["x2", "x16"]
    assert by_group(share, ["a", "a"]) == ({"share": 0.2}, {})


@pytest.mark.parametrize(
    ("names", "target_split", "message"),
    [
        (["wer", "ter"], "spaces", "metrics must be of per, wer, accuracy, edit_distance, bleu, chrf, got 'ter'"),
        ([], "spaces", "metrics must hold at least one metric, and each once, got []"),
        (["wer", "wer"], "spaces", "metrics must hold at least one metric, and each once, got [wer, wer]"),
        (
            ["wer", "bleu"],
            "characters",
            "bleu does not fit data.target_split=characters: it scores texts of several words; "
            "allowed there: per, wer, accuracy, edit_distance",
        ),
    ],
)
def test_invalid_metrics_are_refused(names, target_split, message):
    with pytest.raises(ValueError) as error:
        check_metrics(names, target_split)
    assert str(error.value) == message
