import pytest

from recipes.seq2seq.data.examples import Example
from recipes.seq2seq.data.parallel import load_parallel, read_parallel


@pytest.fixture
def write(tmp_path):
    def write(source, target, split="train"):
        (tmp_path / f"{split}.en").write_text(source, encoding="utf-8")
        (tmp_path / f"{split}.de").write_text(target, encoding="utf-8")
        return str(tmp_path / f"{split}.{{side}}")

    return write


def test_lines_of_two_files_become_examples(write):
    pattern = write("a dog\n two\tcats \n", "ein Hund\nzwei Katzen\n")
    expected = [Example("a dog", ("ein Hund",)), Example("two cats", ("zwei Katzen",))]
    assert read_parallel(pattern, ["en", "de"]) == expected
    assert read_parallel(pattern, ["de", "en"])[0] == Example("ein Hund", ("a dog",))


def test_a_pair_with_an_empty_side_is_skipped(write):
    assert read_parallel(write("a\n\nc\n", "A\nB\n \n"), ["en", "de"]) == [Example("a", ("A",))]


def test_files_of_different_length_are_refused_with_both_counts(write):
    with pytest.raises(ValueError, match=r"same number of lines, got 3 in .*train\.en and 2 in .*train\.de$"):
        read_parallel(write("a\nb\nc\n", "A\nB\n"), ["en", "de"])


def test_files_without_a_pair_are_refused(write):
    with pytest.raises(ValueError, match=r"must hold at least one pair of lines, got none"):
        read_parallel(write("\n", "\n"), ["en", "de"])


def test_error_for_a_missing_side_contains_the_file_name(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^cannot read the data file .*train\.fr: No such file"):
        read_parallel(write("a\n", "A\n"), ["en", "fr"])


def test_three_path_patterns_give_the_three_splits(write):
    patterns = [write(split, "X", split) for split in ("train", "val", "test")]
    splits = load_parallel(*patterns, sides=["en", "de"])
    assert [part[0].source for part in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]
