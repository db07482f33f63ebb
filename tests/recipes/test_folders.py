"""A folder is locked against other processes; a replaced file is always complete, old or new."""

import errno
import os
import subprocess
import sys

import pytest

from recipes.folders import Busy, claimed, is_disk_full, new_folder, remove_if_empty, replacing, write_text

HOLD = """
import sys
from pathlib import Path
from recipes.folders import claimed
with claimed(Path(sys.argv[1]), fixed=sys.argv[2] == "fixed") as folder:
    (folder / "mine").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that lock a folder until their standard input ends; returns each with its folder."""
    started = []

    def start(how: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), how]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_locked_by_another_process_is_refused_until_that_process_is_killed(tmp_path, holder):
    process, folder = holder("fixed")
    with pytest.raises(Busy, match=r"another process uses .*run"), claimed(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    with claimed(tmp_path / "run") as mine:
        assert str(mine) == folder


def test_a_locked_folder_gets_a_number_if_the_name_is_not_fixed(tmp_path, holder):
    assert [os.path.basename(holder("free")[1]) for _ in range(3)] == ["run", "run_2", "run_3"]


def test_the_folder_of_a_finished_run_is_not_reused(tmp_path):
    for name in ("run", "run_2"):
        with claimed(tmp_path / "run", fixed=False) as folder:
            assert folder.name == name
            (folder / "mine").touch()


def test_a_folder_without_files_is_removed_when_its_lock_ends(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_only_an_empty_unlocked_folder_is_removed(tmp_path, holder):
    (tmp_path / "a").mkdir()
    remove_if_empty(tmp_path / "a")
    remove_if_empty(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    _, folder = holder("fixed")
    os.remove(f"{folder}/mine")
    remove_if_empty(tmp_path / "run")
    assert os.path.isdir(folder)


def test_new_folders_have_different_names(tmp_path):
    assert len({new_folder(tmp_path / "a/b") for _ in range(5)}) == 5


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, error):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(type(error)) as raised, replacing(file) as unfinished:
        unfinished.write_text("ne")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"
    assert is_disk_full(raised.value) == isinstance(error, OSError)
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno 28] No space left on device: '{file}'"
    write_text(file, "new")
    assert file.read_text() == "new"


def test_a_file_with_the_ending_tmp_is_not_removed(tmp_path):
    (tmp_path / "words.tmp").write_text("mine")
    write_text(tmp_path / "words", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words", "words.tmp"]
    assert (tmp_path / "words.tmp").read_text() == "mine"


def test_two_writers_of_a_file_use_different_temporary_files(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"  # the block of `second` ends before the block of `first`
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
