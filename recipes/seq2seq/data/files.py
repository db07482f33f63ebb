"""Text files as lines: UTF-8, optionally compressed by gzip, with the line ends of any system."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

_GZIP = b"\x1f\x8b"
# Not splitlines(), which also breaks at characters such as U+2028 that may occur inside a text.
_LINE_END = re.compile(r"\r\n|\r|\n")
_BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file.

    A gzip file is recognised by its first two bytes. Byte order marks are removed at every position: a file that was
    joined from several others may contain one in the middle.

    Raises:
        FileNotFoundError: If the file is missing or cannot be read.
        ValueError: If the file is not UTF-8 text, or is a damaged gzip file.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got an invalid byte at position {error.start}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got a damaged one: {error}") from None
    except OSError as error:
        raise FileNotFoundError(f"cannot read the data file {path}: {error.strerror}") from None
    return split_lines(text)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end in ``\n``, ``\r\n`` or ``\r``.

    Example:
        >>> split_lines("a\r\nb\rc\n")
        ['a', 'b', 'c']
    """
    lines = _LINE_END.split(text.replace(_BYTE_ORDER_MARK, ""))
    return lines[:-1] if lines[-1] == "" else lines
