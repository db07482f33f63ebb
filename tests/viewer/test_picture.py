"""Pictures of the view as SVG, PDF and PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import attention_view
from sparse_attn.viewer import picture as picture_module

pytest.importorskip("matplotlib")

Records = Callable[..., AttentionRecord]


def test_an_svg_has_a_square_for_each_weight(tmp_path: Path) -> None:
    weights = torch.zeros(2, 3, 5)
    weights[1, [0, 0, 1, 2], [0, 4, 1, 2]] = torch.tensor([0.25, 0.75, 1.0, 1.0])
    record = AttentionRecord(keep_weights=True)
    record.add("cross", weights, None, 1.5)
    view = attention_view(record)
    written = view.save(tmp_path / "a.svg", layer=0, head=1).read_bytes()
    ElementTree.fromstring(written)
    empty = view.save(tmp_path / "b.svg", layer=0, head=0).read_bytes()
    assert written.count(b"<path") - empty.count(b"<path") >= 4
    assert written == view.save(tmp_path / "c.svg", layer=0, head=1).read_bytes()


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("chosen", [{}, {"layer": 1}, {"layer": 1, "head": 0}], ids=["all", "layer", "head"])
def test_every_picture_format_is_written(
    encoder_record: Records, tmp_path: Path, ending: str, start: bytes, chosen: dict[str, int]
) -> None:
    file = attention_view(encoder_record(5), list("abcde")).save(tmp_path / f"a.{ending}", **chosen)
    assert file.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_hostile_tokens_are_drawn(hostile: list[str], encoder_record: Records, tmp_path: Path, ending: str) -> None:
    tokens = [*hostile, "$x^2", "한국", "\u0301"]
    file = attention_view(encoder_record(len(tokens)), tokens).save(tmp_path / f"a.{ending}", layer=0, head=0)
    if ending == "svg":
        ElementTree.parse(file)


def test_a_large_matrix_is_drawn_as_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_module, "MOST_SQUARES", 10)
    monkeypatch.setattr(picture_module, "MOST_PIXELS", 16)
    visible = torch.ones(83, 83, dtype=torch.bool).tril()
    record = AttentionRecord(keep_weights=True)
    record.add("layer", torch.randn(1, 1, 83, 83).masked_fill(~visible, -torch.inf).softmax(-1), visible)
    file = attention_view(record).save(tmp_path / "a.svg", layer=0, head=0)
    assert "<image" in file.read_text(encoding="utf-8")


def test_error_without_matplotlib_contains_the_pip_command(
    encoder_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'sparse-attn\[viewer\]'"):
        attention_view(encoder_record(5)).save(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" ", "␣"),
        ("x", "x"),
        ("\u0301", "◌\u0301"),
        ("한a", "U+D55Ca"),
        ("", "∅"),
        ("\n", "U+000A"),
        ("\ud800", "U+D800"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert picture_module.printable(text) == shown


def test_dollars_in_the_name_of_a_layer_are_not_mathematics(tmp_path: Path) -> None:
    record = AttentionRecord(keep_weights=True)
    record.add("a$x_$", torch.rand(1, 2, 3, 3).softmax(-1))
    assert attention_view(record).save(tmp_path / "a.png", layer=0, head=0).stat().st_size > 0
