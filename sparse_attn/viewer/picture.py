"""Attention as a picture for a paper, drawn with matplotlib: few weights are drawn as squares, many as pixels."""

from __future__ import annotations

import io
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.viewer.layers import Layer, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparse_attn.viewer.view import AttentionView

# A vector file with many squares opens slowly: beyond this number of squares, pixels are drawn instead.
MOST_SQUARES = 20_000
MOST_PIXELS = 1024
MOST_NAMED = 80
_SMALL_PIXELS = 96
_NEVER = "#dfe3e8"
_COLOURS = ("#d3e5f6", "#74b0e0", "#1f6db5", "#071f47")


def draw(view: AttentionView, file_format: str, *, layer: int | None, head: int | None) -> bytes:
    """One head with its tokens, or several as small maps.

    Args:
        view: the view; of a batch, the example ``view.first`` is drawn.
        file_format: "svg", "pdf" or "png".
        layer: number of the layer; None: all layers.
        head: number of the head; None: all heads.

    Returns:
        The content of the file.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a picture as .{file_format} needs matplotlib: pip install 'sparse-attn[viewer]'"
        ) from error
    layers = view.layers if layer is None else [view.layers[layer]]
    # Without a date and with fixed identifiers, the same view gives the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[file_format]
    with matplotlib.rc_context({"svg.hashsalt": "sparse-attn", "pdf.fonttype": 42}):
        if layer is not None and head is not None:
            figure = _one_head(layers[0], layers[0].maps[view.first], head, Figure)
        else:
            figure = _many_heads(layers, view.first, Figure)
        written = io.BytesIO()
        figure.savefig(written, format=file_format, dpi=200, metadata=metadata)
    return written.getvalue()


def _one_head(layer: Layer, shown: Map, head: int, figure_class: Any) -> Any:
    queries, keys = len(shown.queries), len(shown.keys)
    named = max(queries, keys) <= MOST_NAMED
    cell = 0.2 if named else 6.0 / max(queries, keys)
    figure = figure_class(figsize=(max(cell * keys, 0.8) + 2.4, max(cell * queries, 0.8) + 1.8), layout="constrained")
    axes = figure.subplots()
    drawn = _draw_map(axes, shown, head, MOST_PIXELS)
    note = "" if drawn == (queries, keys) else f"\n{queries:,} × {keys:,}; a pixel is the largest weight it covers"
    title = printable_text(f"{layer.name or 'attention'} · head {head}{_numbers(layer, head)}") + note
    axes.set_title(title, fontsize=9, parse_math=False)
    if named:
        small = {"fontsize": 8, "parse_math": False}
        axes.set_xticks(range(keys), [printable(token) for token in shown.keys], rotation=90, **small)
        axes.set_yticks(range(queries), [printable(token) for token in shown.queries], **small)
    axes.tick_params(length=0 if named else 3, labelsize=8)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    bar = figure.colorbar(_scale(), ax=axes, shrink=0.6, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("weight; white is exactly 0", fontsize=8)
    return figure


def _many_heads(layers: list[Layer], example: int, figure_class: Any) -> Any:
    heads = max(len(layer.roles) for layer in layers)
    side, gap, left, top = 1.0, 0.32, 0.3, 0.35
    size = (left + heads * (side + 0.1), top + len(layers) * (side + gap + 0.18))
    figure = figure_class(figsize=size)
    squares = MOST_SQUARES
    for row, layer in enumerate(layers):
        y = size[1] - top - row * (side + gap + 0.18)
        name = printable_text(layer.name or "attention")
        figure.text(left / size[0], (y + 0.17) / size[1], name, fontsize=7, weight="bold", parse_math=False)
        for head in range(len(layer.roles)):
            place = (left + head * (side + 0.1), y - side - 0.02, side, side)
            axes = figure.add_axes(tuple(length / size[axis % 2] for axis, length in enumerate(place)))
            shown = layer.maps[example]
            squares -= int((shown.weights[head] != 0).sum())
            _draw_map(axes, shown, head, _SMALL_PIXELS, vectors=squares > 0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{head}{_numbers(layer, head)}", fontsize=5.5, pad=2)
    return figure


def _numbers(layer: Layer, head: int) -> str:
    alpha = f" · α {layer.numbers['alpha'][head]:.2f}" if "alpha" in layer.numbers else ""
    return f"{alpha} · density {layer.numbers['density'][head]:.0%}"


def _draw_map(axes: Axes, shown: Map, head: int, pixels: int, *, vectors: bool = True) -> tuple[int, int]:
    """Draw the weights of a head as squares or pixels, and return how many rows and columns were drawn."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    weights = shown.weights[head].float().abs()
    queries, keys = weights.shape
    scale = _scale()
    axes.set_xlim(-0.5, keys - 0.5)
    axes.set_ylim(queries - 0.5, -0.5)
    axes.set_aspect("equal" if max(queries, keys) <= 8 * min(queries, keys) else "auto")
    row, column = weights.nonzero(as_tuple=True)
    if vectors and len(row) <= MOST_SQUARES:
        if shown.visible is not None:
            axes.set_facecolor(_NEVER)
            axes.add_collection(
                PolyCollection(_runs(shown.visible), facecolors="white", edgecolors="none", antialiaseds=False)
            )
        corners = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
        squares = torch.stack([column, row], -1)[:, None] + corners
        colours = scale.to_rgba(weights[row, column].numpy())
        axes.add_collection(
            PolyCollection(list(squares.numpy()), facecolors=colours, edgecolors="none", antialiaseds=False)
        )
        return queries, keys
    small = F.adaptive_max_pool2d(weights[None], (min(queries, pixels), min(keys, pixels)))[0]
    image = torch.from_numpy(scale.to_rgba(small.numpy())[..., :3]).float()
    image[small == 0] = 1.0
    if shown.visible is not None:
        seen = F.adaptive_max_pool2d(shown.visible[None].float(), (small.shape[0], small.shape[1]))[0] > 0
        image[~seen] = torch.tensor(to_rgb(_NEVER))
    axes.imshow(image.numpy(), extent=(-0.5, keys - 0.5, queries - 0.5, -0.5), interpolation="none", aspect="auto")
    return small.shape[0], small.shape[1]


def _runs(visible: Tensor) -> Any:
    """A rectangle for each run of visible keys in a row."""
    edges = torch.diff(F.pad(visible.int(), (1, 1)), dim=-1)
    row, start = (edges == 1).nonzero(as_tuple=True)
    _, end = (edges == -1).nonzero(as_tuple=True)
    x0, x1, y0, y1 = start - 0.5, end - 0.5, row - 0.5, row + 0.5
    return torch.stack([torch.stack(p, -1) for p in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], 1).numpy()


@cache
def _scale() -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colours = LinearSegmentedColormap.from_list("weights", _COLOURS)
    # The colour is proportional to the square root of the weight, as in the HTML page of the view.
    return ScalarMappable(PowerNorm(0.5, vmin=0.0, vmax=1.0), colours)


def printable(text: str) -> str:
    """The text in a form that matplotlib's font can show.

    A combining mark alone gets a base character. A character without a glyph, or one that changes the display of
    others, is shown as its code point.

    Example:
        >>> printable(" "), printable("한"), printable("")
        ('␣', 'U+D55C', '∅')
    """
    if text in (" ", ""):
        return "␣" if text else "∅"
    known = _characters()
    shown = "".join(
        char if ord(char) in known and unicodedata.category(char)[0] != "C" else f"U+{ord(char):04X}" for char in text
    )
    return f"◌{shown}" if unicodedata.combining(shown[0]) else shown


def printable_text(text: str) -> str:
    """The text with :func:`printable` applied to each word; spaces stay."""
    return " ".join(printable(word) if word else "" for word in text.split(" "))


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
