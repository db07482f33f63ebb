"""Parts of an HTML report that is a single file: pictures are embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows with the same keys; the keys of the first row are the header."""
    header = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def picture(png: bytes, description: str) -> str:
    """An embedded PNG picture."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description, quote=True)}">'


def folded(summary: str, text: str) -> str:
    """Plain text that is hidden until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
