"""Pieces of HTML for a report that is one file: pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a table; the keys of the first are the header."""
    header = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def picture(png: bytes, description: str) -> str:
    """A PNG picture, embedded."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description, quote=True)}">'


def folded(summary: str, text: str) -> str:
    """Plain text that the reader opens."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
