import pytest

from recipes.seq2seq.data.cache import cached_ids, content_key

IDS = [[5, 2], [], [70_000, 6, 2]]


def test_a_second_call_reads_the_cached_file(tmp_path):
    assert cached_ids(tmp_path / "new" / "folder", ["a"], lambda: IDS) == IDS
    assert cached_ids(tmp_path / "new" / "folder", ["a"], lambda: pytest.fail("encoded again")) == IDS
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


def test_changed_text_is_encoded_again(tmp_path):
    cached_ids(tmp_path, ["a"], lambda: IDS)
    assert cached_ids(tmp_path, ["b"], lambda: [[1]]) == [[1]]


def test_different_texts_have_different_names():
    parts = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""]]
    assert len({content_key(part) for part in parts}) == len(parts)


@pytest.mark.parametrize("damage", [lambda content: content[:50], lambda content: b"", lambda content: b"x" * 999])
def test_a_damaged_cache_file_is_written_again(tmp_path, damage):
    cached_ids(tmp_path, ["a"], lambda: IDS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert cached_ids(tmp_path, ["a"], lambda: IDS) == IDS
    assert cached_ids(tmp_path, ["a"], lambda: pytest.fail("not written again")) == IDS


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file can be longer, as on a full disk
    try:
        with pytest.raises(OSError, match=r"^\[Errno \d+\] File too large: '.*\.pt'$"):
            cached_ids(tmp_path, ["a"], lambda: IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cached_ids(None, ["a"], lambda: IDS) == IDS
    assert list(tmp_path.iterdir()) == []
