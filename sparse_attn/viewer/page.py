"""A view as one HTML page: markup, style and program from `page/`, with the data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch

from sparse_attn.analysis.pieces import word_groups
from sparse_attn.analysis.roles import ROLE_THRESHOLDS
from sparse_attn.viewer.encode import encode_map, encode_mask, smallest_kept, to_half_bits, with_fewer_bits

if TYPE_CHECKING:
    from sparse_attn.viewer.view import AttentionView

# Run -> layer -> head -> (step, α).
Courses = dict[str, dict[str, dict[int, list[tuple[int, float]]]]]

# A page with more entries opens too slowly; only the largest entries are then kept.
MOST_ENTRIES = 12_000_000
# With more entries, small weights are written with fewer bits.
MANY_ENTRIES = 500_000
_PROGRAM = (
    "decode.js",
    "state.js",
    "draw.js",
    "heads.js",
    "matrix.js",
    "lines.js",
    "head.js",
    "alpha.js",
    "main.js",
)


def page(view: AttentionView, *, layer: int | None = None, head: int | None = None) -> str:
    """The page of a view.

    Args:
        view: the view.
        layer: the layer with which the page opens; None: the overview.
        head: the head of this layer with which the page opens.
    """
    data, maps = _data(view)
    if layer is not None:
        data["open"] = {"layer": layer, "head": head or 0}
    program = _asset_program()
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": _ascii(html.escape(view.title)),
        "style": _ascii(_asset("style.css")),
        "data": _json(data),
        "maps": "\n".join(f'<script type="text/plain" id="{key}">{text}</script>' for key, text in maps.items()),
        "sections": _ascii("\n".join(_section(*section) for section in view.sections)),
        "program": program,
    }
    text = _ascii(_asset("page.html"))
    pieces = text.split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _data(view: AttentionView) -> tuple[dict[str, Any], dict[str, str]]:
    texts: dict[tuple[str, ...], int] = {}
    masks: dict[str, int] = {}
    histogram = torch.zeros(2**15, dtype=torch.long)
    for layer in view.layers:
        for shown in layer.maps:
            magnitudes = to_half_bits(shown.weights).flatten() & 0x7FFF
            histogram += torch.bincount(magnitudes, minlength=2**15)
    histogram[0] = 0
    total = int(histogram.sum())
    at_least = smallest_kept(histogram, MOST_ENTRIES) if total > MOST_ENTRIES else 1
    coarse = total > MANY_ENTRIES
    maps: dict[str, str] = {}
    layers = []
    for number, layer in enumerate(view.layers):
        described = []
        for place, shown in enumerate(layer.maps):
            bits = to_half_bits(shown.weights)
            encoded = encode_map(with_fewer_bits(bits) if coarse else bits, at_least)
            key = f"map-{number}-{place}"
            maps[key] = encoded.data
            mask = None if shown.visible is None else encode_mask(shown.visible)
            described.append(
                {
                    "id": key,
                    "entries": encoded.entries,
                    "sizes": encoded.sizes,
                    "queries": texts.setdefault(shown.queries, len(texts)),
                    "keys": texts.setdefault(shown.keys, len(texts)),
                    "mask": None if mask is None else masks.setdefault(mask, len(masks)),
                }
            )
        layers.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "roles": layer.roles,
                "numbers": {name: [_number(value) for value in values] for name, values in layer.numbers.items()},
                "maps": described,
            }
        )
    left_out = {"entries": total - int(histogram[at_least:].sum()), "total": total, "below": _from_bits(at_least)}
    data = {
        "title": view.title,
        "first": view.first,
        "examples": view.examples,
        "labels": list(view.labels),
        "texts": [{"tokens": tokens, "words": word_groups(tokens)} for tokens in texts],
        "masks": list(masks),
        "layers": layers,
        "thresholds": ROLE_THRESHOLDS,
        "runs": list(view.courses),  # JavaScript does not keep the order of keys that are numbers
        "courses": {
            run: {name: {str(head): points for head, points in heads.items()} for name, heads in by_layer.items()}
            for run, by_layer in view.courses.items()
        },
        "coarse": coarse,
        "leftOut": left_out if at_least > 1 else None,
    }
    return data, maps


def _from_bits(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int16).view(torch.float16))


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _json(data: object) -> str:
    """JSON in ASCII that cannot end the surrounding HTML element, since each ``<`` is escaped."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ascii(markup: str) -> str:
    """Markup in ASCII; lone surrogates, which HTML does not allow, become the replacement character."""
    whole = markup.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("ascii", "xmlcharrefreplace").decode("ascii")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>\n{content}</section>"


@cache
def _asset(name: str) -> str:
    return (files("sparse_attn.viewer") / "page" / name).read_text(encoding="utf-8")


@cache
def _asset_program() -> str:
    """All of the program as one function, in ASCII: other characters are written as escapes of JavaScript."""
    source = "\n".join(_asset(name) for name in _PROGRAM)
    escaped = "".join(char if ord(char) < 128 else f"\\u{ord(char):04x}" for char in source)
    return f'"use strict";\n(() => {{\n{escaped}\n}})();\n'


__all__: Sequence[str] = ["Courses", "page"]
