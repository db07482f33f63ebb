"""A report as one HTML file that needs nothing beside it: pictures are inside, styles too."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; } th { border-bottom: 2px solid #888; }
td { border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } pre { font-size: 0.85rem; }
pre, .wide { overflow-x: auto; }
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page.

    Args:
        title: plain text.
        sections: heading (plain text) and HTML of each section.
    """
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a table; the keys of the first are the header."""
    header = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def picture(file: Path, description: str) -> str:
    """A PNG file, embedded."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description, quote=True)}">'


def folded(summary: str, text: str) -> str:
    """Plain text that the reader opens."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
