"""Encoded data on disk. The name of a file is a hash of texts and tokenizer, so changed data have another file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ...folders import replacing

Ids = list[list[int]]
# Part of every name. Increase it when the encoding changes.
FORMAT = "1"


def content_key(parts: Iterable[str]) -> str:
    """A name for some texts, equal only for equal texts in the same order.

    Example:
        >>> content_key(["ab", "c"]) == content_key(["a", "bc"])
        False
    """
    digest = hashlib.sha256()
    for part in (FORMAT, *parts):
        encoded = part.encode("utf-8", "surrogatepass")
        # The length marks the end of a part.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def cached_ids(folder: str | Path | None, parts: Sequence[str], encode: Callable[[], Ids]) -> Ids:
    """The result of ``encode()``, read from ``folder`` if the folder has the result for these ``parts``.

    A file that cannot be read is written again.

    Args:
        folder: The folder of the results; None: no file is read or written.
        parts: All texts on which the result depends.
        encode: Computes the result.

    Raises:
        OSError: If a result cannot be written. No incomplete file stays.
    """
    if folder is None:
        return encode()
    file = Path(folder).expanduser() / f"{content_key(parts)}.pt"
    try:
        flat, lengths = torch.load(file, weights_only=True)
        return [part.tolist() for part in flat.split(lengths.tolist())]
    except Exception:  # a missing or damaged file; the exception depends on the damage
        ids = encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    lengths = torch.tensor([len(row) for row in ids])
    # torch.save writes to memory: if it wrote to a full disk, its error would not name the cause.
    content = io.BytesIO()
    torch.save((torch.tensor([token for row in ids for token in row], dtype=torch.int32), lengths), content)
    with replacing(file) as unfinished:
        unfinished.write_bytes(content.getvalue())
    return ids
