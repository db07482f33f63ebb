import gzip

import pytest

from recipes.seq2seq.data.files import read_lines, split_lines

LINES = ["szép\ts", "", "b\u2028c\td"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_line_ends_and_compression_do_not_change_the_lines(tmp_path, end, compress):
    file = tmp_path / "a.txt"
    file.write_bytes(compress(end.join(LINES).encode()))
    assert read_lines(file) == LINES
    file.write_bytes(compress("".join(line + end for line in LINES).encode()))
    assert read_lines(file) == LINES


def test_a_byte_order_mark_is_removed_from_the_start_of_every_line(tmp_path):
    file = tmp_path / "two_files_in_one.txt"
    file.write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    assert read_lines(file) == ["a", "b"]


def test_an_empty_text_has_no_lines():
    assert split_lines("") == []
    assert split_lines("\n") == [""]


@pytest.mark.parametrize("cut", [7, -3])
def test_error_for_a_damaged_gzip_file_contains_its_name(tmp_path, cut):
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"a\tb\n" * 1000)[:cut])
    with pytest.raises(ValueError, match=r"a\.gz must be a whole gzip file, got a damaged one"):
        read_lines(file)


def test_invalid_utf8_inside_a_gzip_file_is_refused(tmp_path):
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"a\xff"))
    with pytest.raises(ValueError, match=r"a\.gz must be UTF-8 text, got an invalid byte at position 1$"):
        read_lines(file)
