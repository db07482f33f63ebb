"""Tests of `attention_view`: invalid arguments, saved files, and the display in a notebook."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import attention_view

Records = Callable[..., AttentionRecord]
Reader = Callable[[str], Any]
HEADS, QUERIES, KEYS = 3, 5, 7  # sizes used by the fixtures that record a model


def without_weights() -> AttentionRecord:
    record = AttentionRecord()
    record.add("layer", torch.rand(1, 1, 2, 2))
    return record


def not_finite(value: float) -> AttentionRecord:
    record = AttentionRecord(keep_weights=True)
    record.add("layer", torch.tensor([[[[value, 0.0], [0.5, 0.5]]]]))
    return record


def batches_of_two_sizes() -> AttentionRecord:
    record = AttentionRecord(keep_weights=True)
    record.add("a", torch.rand(1, 1, 2, 2))
    record.add("b", torch.rand(3, 1, 2, 2))
    return record


@pytest.mark.parametrize(
    ("record", "arguments", "error", "message"),
    [
        (
            lambda make: make(5),
            {"tokens": list("abc")},
            ValueError,
            "tokens must have one token for each of the 5 queries of .* got 3 tokens",
        ),
        (
            lambda make: make(5),
            {"tokens": list("abcdef")},
            ValueError,
            "tokens must have one token for each of the 5 queries .* got 6 tokens",
        ),
        (lambda make: make(5), {"tokens": []}, ValueError, "for each of the 5 queries .* got 0 tokens"),
        (lambda make: make(5), {"tokens": "abcde"}, TypeError, "tokens must be a list of strings, .* got str"),
        (lambda make: make(5), {"tokens": [1, 2, 3, 4, 5]}, TypeError, "tokens must be strings, got int"),
        (
            lambda make: make(5),
            {"memory_tokens": list("ab")},
            ValueError,
            "memory_tokens name the keys of cross-attention, but",
        ),
        (
            lambda make: make(5, 2),
            {"tokens": [list("abcde")]},
            ValueError,
            "a list for each of the 2 examples .* got 1",
        ),
        (lambda make: make(5, 2), {"example": 2}, ValueError, "example must be from 0 to 1, .* holds 2, got 2"),
        (lambda make: make(5, 2), {"example": -1}, ValueError, "example must be from 0 to 1"),
        (lambda make: make(5), {"example": "0"}, TypeError, "example must be an int, got str"),
        (lambda make: make(5), {"title": 5}, TypeError, "title must be a string, got int"),
        (
            lambda make: make(5),
            {"courses": {"a": [(0, "x", 0, 1.5)]}},
            ValueError,
            "courses.'a'. must contain only layers and heads of the record, got 'x', 0",
        ),
        (
            lambda make: make(5),
            {"numbers": {"n": {"x": torch.ones(3)}}},
            ValueError,
            "numbers.'n'. must contain only layers of the record, got 'x'",
        ),
        (
            lambda make: make(5),
            {"numbers": {"n": {"layers.0.self_attn": [1.0, 2.0, 3.0]}}},
            TypeError,
            r"numbers\['n'\]\['layers.0.self_attn'\] must be a torch.Tensor, got list",
        ),
        (lambda make: make(5), {"numbers": [1.0]}, TypeError, "numbers must be a dict, got list"),
        (
            lambda make: make(5),
            {"numbers": {"n": 1.0}},
            TypeError,
            "numbers.'n'. must be a dict .* got float",
        ),
        (lambda make: make(5), {"courses": [(0, "a", 0, 1.5)]}, TypeError, "courses must be a dict .* got list"),
        (
            lambda make: make(5),
            {"courses": {"a": [("0", "layers.0.self_attn", 0, 1.5)]}},
            TypeError,
            "the step in courses.'a'. must be an int, got '0'",
        ),
        (
            lambda make: make(5),
            {"courses": {"a": [(0, "layers.0.self_attn", 0, torch.tensor(1.5))]}},
            TypeError,
            "α in courses.'a'. must be a number, got tensor",
        ),
        (
            lambda make: make(5),
            {"numbers": {"density": {"layers.0.self_attn": torch.ones(HEADS)}}},
            ValueError,
            "numbers must not contain 'density' for layer 'layers.0.self_attn', since the view has it from the record",
        ),
        (
            lambda _: AttentionRecord(keep_weights=True),
            {},
            ValueError,
            "at least one call of an attention layer, got none",
        ),
        (
            lambda _: without_weights(),
            {},
            ValueError,
            "record must hold weights, .* record_attention.model, weights=True",
        ),
        (
            lambda _: not_finite(float("nan")),
            {},
            ValueError,
            "weights must be finite, got NaN or infinity in layer 'layer'",
        ),
        (lambda _: not_finite(float("inf")), {}, ValueError, "weights must be finite"),
        (lambda _: batches_of_two_sizes(), {}, ValueError, r"the same number of examples, got \[1, 3\]"),
        (
            lambda _: {"layer": 1},
            {},
            TypeError,
            "record must be an AttentionRecord from record_attention, got dict",
        ),
    ],
)
def test_invalid_arguments_raise_one_line_errors(
    encoder_record: Records,
    record: Callable[[Records], Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        attention_view(record(encoder_record), **arguments)
    assert "\n" not in str(raised.value)


def test_both_sides_of_cross_attention_are_checked(translation: AttentionRecord) -> None:
    queries, keys = ["q"] * QUERIES, ["k"] * KEYS
    with pytest.raises(
        ValueError, match=r"^tokens .* 5 queries of layer 'decoder\.layers\.0\.self_attn', got 4 tokens"
    ):
        attention_view(translation, ["q"] * 4, keys)
    with pytest.raises(ValueError, match=r"memory_tokens .* of the 7 queries of layer 'encoder\.layers\.0"):
        attention_view(translation, queries, ["k"] * 6)
    with pytest.raises(ValueError, match="tokens and memory_tokens must both be of one text, or both be a list"):
        attention_view(translation, [queries, queries], keys)


@pytest.mark.parametrize(
    ("path", "arguments", "error", "message"),
    [
        ("a.gif", {}, ValueError, r"path must end in \.html, \.svg, \.pdf, \.png, got .*a\.gif"),
        ("a", {}, ValueError, "path must end in"),
        ("a.svg", {"layer": 2}, ValueError, "layer must be from 0 to 1, got 2"),
        ("a.svg", {"layer": -1}, ValueError, "layer must be from 0 to 1, got -1"),
        ("a.svg", {"layer": "nowhere"}, ValueError, "layer must be one of 'layers.0.self_attn', .* got 'nowhere'"),
        ("a.svg", {"layer": 1.0}, TypeError, "layer must be an int or a name, got float"),
        ("a.html", {"layer": 0, "head": HEADS}, ValueError, "head must be from 0 to 2 in layer .* got 3"),
        ("a.png", {"head": 0}, ValueError, "head can be given only together with layer, got head 0 without a layer"),
        ("missing/a.html", {}, FileNotFoundError, "path must lie in a folder that exists"),
    ],
)
def test_save_with_an_invalid_argument_writes_no_file(
    encoder_record: Records, tmp_path: Path, path: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention_view(encoder_record(5)).save(tmp_path / path, **arguments)
    assert not list(tmp_path.iterdir())


def test_layer_head_and_example_may_be_ints_of_numpy_or_of_a_tensor(encoder_record: Records, tmp_path: Path) -> None:
    view = attention_view(encoder_record(5, 2), example=1)
    expected = view.save(tmp_path / "a.html", layer=1, head=2).read_bytes()
    for one, two in ((numpy.int64(1), numpy.int64(2)), (torch.tensor(1), torch.tensor(2))):
        other = attention_view(encoder_record(5, 2), example=one)  # type: ignore[arg-type]
        assert other.first == view.first
        assert view.save(tmp_path / "b.html", layer=one, head=two).read_bytes() == expected  # type: ignore[arg-type]


def test_a_failed_save_keeps_the_existing_file(
    encoder_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = attention_view(encoder_record(5))
    file = view.save(str(tmp_path / "a.html"))
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        view.save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_saved_file_has_the_mode_of_a_new_file_and_the_umask_never_changes(
    encoder_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The umask belongs to the process: during a change, files of other threads would get wrong modes.
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    file = attention_view(encoder_record(5)).save(tmp_path / "a.html")
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_saved_page_opens_at_the_given_layer_and_head(
    encoder_record: Records, read_page: Reader, tmp_path: Path
) -> None:
    view = attention_view(encoder_record(5), list("abcde"), title="five")
    html = view.save(tmp_path / "a.html").read_text(encoding="ascii")
    assert html == view.html() and "open" not in read_page(html).data
    html = view.save(tmp_path / "b.html", layer="layers.1.self_attn", head=2).read_text(encoding="ascii")
    assert read_page(html).data["open"] == {"layer": 1, "head": 2}


def test_a_notebook_displays_the_page_in_a_frame(encoder_record: Records) -> None:
    shown = attention_view(encoder_record(5), title='a "title"')._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and 'title="a &quot;title&quot;"' in shown


def test_attention_view_does_not_change_the_record(encoder_record: Records) -> None:
    record = encoder_record(5)
    before = {name: copy.deepcopy(heads.weights) for name, heads in record.items()}
    attention_view(record).html()
    for name, heads in record.items():
        assert heads.weights is not None and torch.equal(heads.weights, before[name])
