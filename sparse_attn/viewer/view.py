"""`attention_view`: a record of attention as a page and as pictures."""

from __future__ import annotations

import html
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sparse_attn.analysis.statistics import AttentionRecord
from sparse_attn.checks import check_int, check_number, described_type, is_int
from sparse_attn.viewer.layers import Layer, Texts, batch_of_weights, read_layers
from sparse_attn.viewer.page import Courses, page

__all__ = ["AttentionView", "attention_view"]

PICTURES = (".svg", ".pdf", ".png")
_NOTEBOOK_HEIGHT = 760


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A view of recorded attention; made by :func:`attention_view`.

    A notebook displays the view if it is the last value of a cell.

    Attributes:
        layers: the layers that are shown.
        title: title of the page.
        examples: numbers of the shown examples in the batch.
        first: the example with which the page opens, and which pictures show.
        courses: run -> layer -> head -> α by step.
        labels: one name for each example; without labels, the page names an example by its tokens.
        sections: heading and HTML of further sections, which the page shows in a separate view.
    """

    layers: list[Layer] = field(repr=False)
    title: str
    examples: list[int] = field(repr=False)
    first: int = field(repr=False)
    courses: Courses = field(repr=False)
    labels: Sequence[str] = field(default=(), repr=False)
    sections: Sequence[tuple[str, str]] = field(default=(), repr=False)

    def html(self) -> str:
        """The page: one ASCII text that needs no other file and sends no request."""
        return page(self)

    def _repr_html_(self) -> str:
        """HTML for a notebook: the page in a frame, so that page and notebook do not change each other's style."""
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" title="{html.escape(_encodable(self.title))}" '
            f'sandbox="allow-scripts allow-downloads" '
            f'style="width:100%;height:{_NOTEBOOK_HEIGHT}px;border:0"></iframe>'
        )

    def save(self, path: str | os.PathLike[str], layer: int | str | None = None, head: int | None = None) -> Path:
        """Write the page, or a picture for a paper, depending on the ending of the name.

        Args:
            path: ends in ``.html``, or in ``.svg``, ``.pdf`` or ``.png`` for a picture, which needs matplotlib. A file
                of this name is replaced when the new file is complete.
            layer: number or name of the layer that the picture shows, or with which the page opens; None: all
                layers.
            head: number of the head; None: all heads.

        Returns:
            The path.

        Raises:
            ValueError: if the path has another ending, or there is no such layer or head.
            FileNotFoundError: if the folder does not exist.
            ModuleNotFoundError: if ``path`` is a picture and matplotlib is not installed.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".html", *PICTURES):
            raise ValueError(f"path must end in .html, {', '.join(PICTURES)}, got {str(path)!r}")
        chosen = None if layer is None else self.layer_number(layer)
        head = self._head_number(chosen, head)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path must lie in a folder that exists, got {str(path)!r}")
        if ending == ".html":
            content = page(self, layer=chosen, head=head).encode("ascii")
        else:
            from sparse_attn.viewer.picture import draw

            content = draw(self, ending[1:], layer=chosen, head=head)
        _replace(path, content)
        return path

    def layer_number(self, layer: int | str) -> int:
        """The position of a layer, given by its number or name.

        Raises:
            TypeError: if ``layer`` is neither an int nor a name.
            ValueError: if there is no such layer.
        """
        names = [each.name for each in self.layers]
        if isinstance(layer, str):
            if layer not in names:
                raise ValueError(f"layer must be one of {', '.join(map(repr, names))}, got {layer!r}")
            return names.index(layer)
        if not is_int(layer):
            raise TypeError(f"layer must be an int or a name, got {described_type(layer)}")
        if not 0 <= layer < len(names):
            raise ValueError(f"layer must be from 0 to {len(names) - 1}, got {int(layer)}")
        return int(layer)

    def _head_number(self, layer: int | None, head: int | None) -> int | None:
        if head is None:
            return None
        if not is_int(head):
            raise TypeError(f"head must be an int, got {described_type(head)}")
        if layer is None:
            raise ValueError(f"head can be given only together with layer, got head {head} without a layer")
        heads = len(self.layers[layer].roles)
        if not 0 <= head < heads:
            name = self.layers[layer].name
            raise ValueError(f"head must be from 0 to {heads - 1} in layer {name!r}, got {int(head)}")
        return int(head)


def attention_view(
    record: AttentionRecord,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    memory_tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    title: str | None = None,
    example: int = 0,
    courses: Mapping[str, Iterable[tuple[int, str, int, float]]] | None = None,
    numbers: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> AttentionView:
    """Show recorded attention: every head as a small map, one head in detail, and α.

    This works for every model that :func:`sparse_attn.record_attention` can record. The names and shapes of the layers
    determine their tokens: cross-attention has queries in ``tokens`` and keys in ``memory_tokens``; in a model with
    cross-attention, layers with "encoder" in their name read ``memory_tokens``; all other layers read ``tokens``.

    Args:
        record: from ``record_attention(model, weights=True)``. The view shows the weights of each layer's last call,
            and α, density and entropy over all calls.
        tokens: the tokens that the model read, one string per position; for a batch, one such list per example, the
            longest with the padded length of the batch. None: position numbers are shown.
        memory_tokens: the tokens of the keys of cross-attention, in the same form.
        title: title of the page.
        example: the example of the batch that is shown; with one list per example, the page contains all examples and
            opens with this one.
        courses: curves of α over training, for one run or several, as rows (step, layer, head, α); layers have the same
            names as in the record.
        numbers: further statistics of the heads, by which the page can sort: name -> layer -> (H,). A name must not be
            that of a statistic which the view has from the record, such as ``"density"``.

    Returns:
        A view with ``html()`` and ``save(path)``; a notebook displays it.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the record contains no weights, weights are not finite, the number of tokens does not match, or
            ``numbers`` or ``courses`` do not fit the record.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_attn import record_attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1).eval()
        >>> with record_attention(model, weights=True) as record:
        ...     _ = model(torch.randn(1, 3, 8))
        >>> view = attention_view(record, tokens=["the", "cat", "sat"], title="A cat")
        >>> view
        AttentionView(title='A cat')
        >>> "<script>" in view.html()
        True
    """
    batch = batch_of_weights(record)
    count = len(next(iter(batch.values())))
    if not is_int(example):
        raise TypeError(f"example must be an int, got {described_type(example)}")
    example = int(example)
    if not 0 <= example < count:
        raise ValueError(f"example must be from 0 to {count - 1}, since the record holds {count}, got {example}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    texts, batched = _texts("tokens", tokens, count, example)
    memory, memory_batched = _texts("memory_tokens", memory_tokens, count, example)
    if texts is not None and memory is not None and batched != memory_batched:
        raise ValueError("tokens and memory_tokens must both be of one text, or both be a list per example")
    examples = list(range(count)) if batched or memory_batched else [example]
    layers = read_layers(record, texts, memory, examples)
    _add_numbers(layers, numbers or {})
    return AttentionView(
        layers=layers,
        title=title if title is not None else "Attention",
        examples=examples,
        first=examples.index(example),
        courses=_checked_courses(courses or {}, layers),
    )


def _texts(name: str, given: object, count: int, example: int) -> tuple[Texts, bool]:
    """The tokens of each shown example, and whether the whole batch is shown."""
    if given is None:
        return None, False
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a list of strings, or one such list per example, got {type(given).__name__}")
    nested = [isinstance(text, Sequence) and not isinstance(text, str) for text in given]
    batched = bool(nested) and all(nested)
    texts = list(given) if batched else [given]
    for text in texts:
        for token in text:
            if not isinstance(token, str):
                raise TypeError(f"{name} must be strings, got {type(token).__name__}")
    if batched and len(texts) != count:
        raise ValueError(f"{name} must have a list for each of the {count} examples of the record, got {len(texts)}")
    return texts, batched


def _add_numbers(layers: list[Layer], numbers: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not isinstance(numbers, Mapping):
        raise TypeError(f"numbers must be a dict, got {type(numbers).__name__}")
    for name, by_layer in numbers.items():
        if not isinstance(by_layer, Mapping):
            raise TypeError(f"numbers[{name!r}] must be a dict from layers to tensors, got {type(by_layer).__name__}")
        if unknown := [layer for layer in by_layer if layer not in {each.name for each in layers}]:
            raise ValueError(f"numbers[{name!r}] must contain only layers of the record, got {unknown[0]!r}")
        for layer in layers:
            if layer.name in by_layer:
                if name in layer.numbers:
                    raise ValueError(
                        f"numbers must not contain {name!r} for layer {layer.name!r}, "
                        "since the view has it from the record"
                    )
                values = by_layer[layer.name]
                heads = len(layer.roles)
                if not isinstance(values, Tensor):
                    raise TypeError(
                        f"numbers[{name!r}][{layer.name!r}] must be a torch.Tensor, got {type(values).__name__}"
                    )
                if tuple(values.shape) != (heads,):
                    raise ValueError(
                        f"numbers[{name!r}][{layer.name!r}] must have a value for each of {heads} heads, "
                        f"got the shape {tuple(values.shape)}"
                    )
                layer.numbers[name] = values.tolist()


def _checked_courses(courses: Mapping[str, Iterable[tuple[int, str, int, float]]], layers: list[Layer]) -> Courses:
    if not isinstance(courses, Mapping):
        raise TypeError(f"courses must be a dict from runs to rows, got {type(courses).__name__}")
    heads = {layer.name: len(layer.roles) for layer in layers}
    checked: Courses = {}
    for run, rows in courses.items():
        points: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for step, layer, head, alpha in rows:
            check_int(step, f"the step in courses[{run!r}]")
            check_int(head, f"the head in courses[{run!r}]")
            check_number(alpha, f"α in courses[{run!r}]")
            if not 0 <= head < heads.get(layer, 0):
                raise ValueError(
                    f"courses[{run!r}] must contain only layers and heads of the record, got {layer!r}, {head}"
                )
            if not math.isfinite(alpha):
                raise ValueError(
                    f"courses[{run!r}] must contain finite α, got {alpha} at step {step} of {layer!r}, {head}"
                )
            points.setdefault(layer, {}).setdefault(int(head), []).append((int(step), float(alpha)))
        checked[run] = {
            layer: {head: sorted(of_head) for head, of_head in sorted(of_layer.items())}
            for layer, of_layer in points.items()
        }
    return checked


def _replace(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that no half-written file exists at ``path``."""
    # `tempfile` makes files that only their owner can read; `open` gives a file the usual permissions.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _encodable(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
