import pytest

from recipes.seq2seq.data.examples import Example
from recipes.seq2seq.data.tsv import load_tsv, read_pairs


@pytest.fixture
def write(tmp_path):
    def write(content, name="pairs.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_lines_become_examples(write):
    path = write("szép\ts eː p\nba ba\tɓ aː ˧˧ ɓ aː\n")
    assert read_pairs(path) == [Example("szép", ("s eː p",)), Example("ba ba", ("ɓ aː ˧˧ ɓ aː",))]


@pytest.mark.parametrize(
    "content",
    [
        b"a\tA\nb\tB B\n",
        b"a\tA\nb\tB B",  # no line end at the end
        b"a\tA\r\nb\tB B\r\n",
        b"\xef\xbb\xbfa\tA\nb\tB B\n",
        b"\n a \t A \n\n   \nb\tB B\n\n",
    ],
    ids=["plain", "no last line end", "CRLF", "byte order mark", "blank lines and outer spaces"],
)
def test_every_way_to_write_the_same_file(write, content):
    assert read_pairs(write(content)) == [Example("a", ("A",)), Example("b", ("B B",))]


def test_a_word_on_two_lines_is_two_examples(write):
    examples = read_pairs(write("read\tr ɛ d\nread\tr i d\n"))
    assert examples == [Example("read", ("r ɛ d",)), Example("read", ("r i d",))]


def test_line_separators_inside_a_text_do_not_end_the_line(write):
    assert read_pairs(write("a\u2028b\tA\x0bB\n")) == [Example("a\u2028b", ("A\x0bB",))]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a\tA\n\nb B\n", 3, "a line must be source<TAB>target, got 0 tabs in 'b B'"),
        ("a\tA\tB\n", 1, "a line must be source<TAB>target, got 2 tabs in 'a\\tA\\tB'"),
        ("a\tA\n\tA\n", 2, "the source must not be empty, got '\\tA'"),
        ("a\tA\nb\t \n", 2, "the target must not be empty, got 'b\\t '"),
        ("\t\n", 1, "the source must not be empty, got '\\t'"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(write, content, line, message):
    path = write(content)
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert str(error.value) == f"{path}:{line}: {message}"


def test_a_long_malformed_line_is_not_printed_whole(write):
    with pytest.raises(ValueError) as error:
        read_pairs(write("a" * 100_000))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write, content):
    path = write(content)
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert str(error.value) == f"{path} must hold at least one source<TAB>target line, got an empty file"


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.tsv"
    with pytest.raises(FileNotFoundError) as error:
        read_pairs(path)
    assert str(error.value) == f"cannot read the data file {path}: No such file or directory"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^cannot read the data file .*: Is a directory$"):
        read_pairs(tmp_path)


def test_a_file_that_is_not_text_is_refused(write):
    with pytest.raises(ValueError, match=r"pairs\.tsv must be UTF-8 text, got byte 2 that is not$"):
        read_pairs(write(b"a\t\xff\n"))


def test_the_three_files_are_the_three_splits(write):
    names = ("train", "val", "test")
    splits = load_tsv(*(write(f"{name}\tX\n", f"{name}.tsv") for name in names))
    assert [part[0].source for part in (splits.train, splits.val, splits.test)] == list(names)
