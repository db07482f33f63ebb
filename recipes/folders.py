"""Makes and locks folders, replaces files by complete new files or not at all, and checks output paths."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no lock on a folder
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EAGAIN, errno.EACCES)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Busy(FileExistsError):
    """Another process has locked the folder."""


def new_folder(folder: Path) -> Path:
    """Makes a folder with this name, or with ``_2``, ``_3``, ... appended if the name exists.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     [new_folder(Path(place, "run")).name for _ in range(3)]
        ['run', 'run_2', 'run_3']
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for candidate in _numbered(folder):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()  # if two processes try this, only one succeeds
            return candidate
    raise AssertionError("unreachable")


@contextlib.contextmanager
def claimed(folder: Path, *, fixed: bool = True) -> Iterator[Path]:
    """Locks a folder against other calls of this function during a ``with`` block; a missing folder is made.

    The folder itself is locked, so that no lock file is left. The lock ends with the process, also after a kill. Where
    the system cannot lock a folder, as on Windows and some network file systems, nothing is locked.

    Args:
        folder: The requested folder.
        fixed: Whether only this folder may be used. Otherwise, the first of ``folder``, ``folder_2``, ... that is empty
            and not locked is used.

    Yields:
        The folder, which is removed at the end if it is empty.

    Raises:
        Busy: If another process has locked the folder, and ``fixed`` is true.
    """
    for candidate in [folder] if fixed else _numbered(folder):
        try:
            lock = _lock(candidate)
        except Busy:
            if fixed:
                raise
            continue
        try:
            if not fixed and any(candidate.iterdir()):
                continue
            yield candidate
            return
        finally:
            with contextlib.suppress(OSError):
                candidate.rmdir()  # fails unless the folder is empty
            if lock is not None:
                os.close(lock)


def remove_if_empty(folder: Path) -> None:
    """Removes an empty folder that no process has locked."""
    if folder.is_dir():
        with contextlib.suppress(Busy), claimed(folder):
            pass


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to in a ``with`` block; at the end of the block, the complete new file replaces ``file``.

    After an error or a kill, ``file`` is either the complete old file or the complete new file. A kill may leave the
    temporary file ``.NAME.XXXXXXXX.tmp``. If ``file`` is a link, the link stays, and its target is replaced. A pipe or
    a device, such as ``/dev/stdout``, is written to directly.

    Raises:
        OSError: If the file cannot be written. The error names ``file``, unless ``file`` is a pipe or a device.
    """
    if file.exists() and not file.is_file():
        yield file
        return
    place = file.resolve()
    # The name is random: a file with a fixed name could belong to the user, or to another process.
    unfinished = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):  # the error may name the temporary file
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files that a killed process left in a folder while it replaced a file.

    No other process may be writing into the folder.
    """
    for file in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):  # only names of `replacing`: others may be the user's
        file.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text with :func:`replacing`."""
    with replacing(file) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)


def check_output(key: str, given: str) -> Path:
    """Checks the path of an output file before a command starts its work, and returns the path.

    Args:
        key: The key of the command, for the message.
        given: The value of the key.

    Raises:
        OSError: If ``given`` is a folder, or lies in a folder that does not exist or cannot be written to.
    """
    file = Path(given).expanduser()
    folder = file.resolve().parent
    if file.is_dir():
        raise IsADirectoryError(f"{key} must be a file, got the folder {given!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{key} must be a file in an existing folder, got {given!r}")
    if (file.is_file() or not file.exists()) and not os.access(folder, os.W_OK):
        raise PermissionError(f"{key} must be a file in a folder that can be written to, got {given!r}")
    return file


def check_output_folder(key: str, given: str) -> Path:
    """Like :func:`check_output`, but for a folder, which need not exist yet.

    Raises:
        OSError: If a file has the name of the folder or of a folder above it, or the folder cannot be written to.
    """
    folder = Path(given).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{key} must be a folder, got {given!r}, where {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{key} must be a folder that can be written to, got {given!r}")
    return folder


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full, or that a quota or the largest size of a file is reached."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}_{number}")


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the lock, or ``None`` if the system cannot lock a folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise Busy(f"another process uses {folder}; wait until it ends or choose another folder") from None
            return None  # some network file systems have no such lock
        os.close(descriptor)  # another process removed the folder and perhaps created it again
