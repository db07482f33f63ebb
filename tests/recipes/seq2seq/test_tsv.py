import pytest

from recipes.seq2seq.data.examples import Example
from recipes.seq2seq.data.tsv import check_columns, find_languages, input_fields, load_tsv, read_examples


@pytest.fixture
def write(tmp_path):
    def write(content, name="pairs.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_lines_become_examples(write):
    path = write("szép\ts eː p\nba ba\tɓ aː ˧˧ ɓ aː\n")
    assert read_examples(path) == [Example("szép", ("s eː p",)), Example("ba ba", ("ɓ aː ˧˧ ɓ aː",))]


@pytest.mark.parametrize(
    "content",
    [
        b"a\tA\nb\tB B\n",
        b"a\tA\nb\tB B",  # no line end at the end
        b"a\tA\r\nb\tB B\r\n",
        b"\xef\xbb\xbfa\tA\nb\tB B\n",
        b"a\tA\rb\tB B\r",
        b"\n a \t A \n\n   \nb\tB B\n\n",
    ],
    ids=["plain", "no last line end", "CRLF", "byte order mark", "CR", "blank lines and outer spaces"],
)
def test_line_ends_blank_lines_and_byte_order_marks_do_not_change_the_examples(write, content):
    assert read_examples(write(content)) == [Example("a", ("A",)), Example("b", ("B B",))]


def test_a_word_on_two_lines_is_two_examples(write):
    examples = read_examples(write("read\tr ɛ d\nread\tr i d\n"))
    assert examples == [Example("read", ("r ɛ d",)), Example("read", ("r i d",))]


def test_line_separators_inside_a_text_do_not_end_the_line(write):
    assert read_examples(write("a\u2028b\tA\x0bB\n")) == [Example("a\u2028b", ("A\x0bB",))]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (
            "a\tA\n\nb B\n",
            3,
            "a line must be source<TAB>target, got 0 tabs in 'b B'; data.columns lists the columns",
        ),
        (
            "a\tA\tB\n",
            1,
            "a line must be source<TAB>target, got 2 tabs in 'a\\tA\\tB'; data.columns lists the columns",
        ),
        ("a\tA\n\tA\n", 2, "the source must not be empty, got '\\tA'"),
        ("a\tA\nb\t \n", 2, "the target must not be empty, got 'b\\t '"),
        ("\t\n", 1, "the source must not be empty, got '\\t'"),
    ],
)
def test_error_for_a_malformed_line_has_file_and_line_number(write, content, line, message):
    path = write(content)
    with pytest.raises(ValueError) as error:
        read_examples(path)
    assert str(error.value) == f"{path}:{line}: {message}"


def test_columns_can_be_in_any_order(write):
    expected = [Example("gehen\tV;PST", ("ging",))]
    assert read_examples(write("gehen\tging\tV;PST\n"), ["source", "target", "features"]) == expected
    assert read_examples(write("gehen\tV;PST\tging\n"), ["source", "features", "target"]) == expected
    assert read_examples(write("ging\tgehen\n"), ["target", "source"]) == [Example("gehen", ("ging",))]


def test_a_line_with_another_number_of_columns_raises_an_error(write):
    path = write("gehen\tging\tV;PST\nsehen\tsah\n")
    with pytest.raises(ValueError) as error:
        read_examples(path, ["source", "target", "features"])
    assert str(error.value) == (
        f"{path}:2: a line must be source<TAB>target<TAB>features, got 1 tabs in 'sehen\\tsah'; "
        "data.columns lists the columns"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["source", "taget"], "columns must be of source, target, features, got 'taget' in [source, taget]"),
        (["source", "features"], "columns must hold source and target, and each column once, got [source, features]"),
        (["source", "target", "target"], "columns must hold source and target, and each column once, got [source, "),
        ([], "columns must hold source and target, and each column once, got []"),
    ],
)
def test_invalid_columns_are_refused(columns, message):
    with pytest.raises(ValueError) as error:
        check_columns(columns)
    assert str(error.value).startswith(message)


def test_the_language_is_put_before_the_source_and_used_as_group(write, tmp_path):
    for language in ("hun", "ady"):
        write(f"{language}\tX\n", f"{language}_train.tsv")
    pattern = tmp_path / "{language}_train.tsv"
    expected = [Example(f"{language}\t{language}", ("X",), language) for language in ("ady", "hun")]
    for chosen in ("all", ["ady", "hun"]):
        assert load_tsv(pattern, pattern, pattern, languages=chosen).train == expected
    assert input_fields(["source", "target"], languages=True) == ["language", "source"]


def test_languages_are_found_by_their_files(tmp_path):
    for name in ("a/b_train", "a/c_train", "d/d_train", "a/b_dev"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tsv").touch()
    assert find_languages(str(tmp_path / "a" / "{language}_train.tsv")) == ["b", "c"]
    assert find_languages(str(tmp_path / "{language}" / "{language}_train.tsv")) == ["d"]


def test_error_for_a_language_without_a_file_names_the_language(write, tmp_path):
    write("a\tX\n", "hun_train.tsv")
    pattern = tmp_path / "{language}_train.tsv"
    with pytest.raises(FileNotFoundError) as error:
        load_tsv(pattern, pattern, pattern, languages=["hun", "xyz"])
    assert str(error.value) == (
        f"languages must have a file each, got 'xyz' without {tmp_path / 'xyz_train.tsv'}; there are files for: hun"
    )


def test_all_languages_need_at_least_one_training_file(tmp_path):
    pattern = tmp_path / "{language}_train.tsv"
    with pytest.raises(FileNotFoundError) as error:
        load_tsv(pattern, pattern, pattern, languages="all")
    assert str(error.value) == f"languages=all must find a training file, got none that is named {pattern}"


def test_a_long_malformed_line_is_not_printed_whole(write):
    with pytest.raises(ValueError) as error:
        read_examples(write("a" * 100_000))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf"])
def test_an_empty_or_blank_file_is_refused(write, content):
    path = write(content)
    with pytest.raises(ValueError) as error:
        read_examples(path)
    assert str(error.value) == f"{path} must hold at least one source<TAB>target line, got an empty or blank file"


def test_error_for_a_missing_file_contains_its_name(tmp_path):
    path = tmp_path / "none.tsv"
    with pytest.raises(FileNotFoundError) as error:
        read_examples(path)
    assert str(error.value) == f"cannot read the data file {path}: No such file or directory"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^cannot read the data file .*: Is a directory$"):
        read_examples(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(write):
    with pytest.raises(ValueError, match=r"pairs\.tsv must be UTF-8 text, got an invalid byte at position 2$"):
        read_examples(write(b"a\t\xff\n"))


def test_three_files_give_the_three_splits(write):
    names = ("train", "val", "test")
    splits = load_tsv(*(write(f"{name}\tX\n", f"{name}.tsv") for name in names))
    assert [part[0].source for part in (splits.train, splits.val, splits.test)] == list(names)
