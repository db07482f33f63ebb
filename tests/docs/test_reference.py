"""Every public name and every configuration key has an entry in the reference, and missing entries are reported."""

from __future__ import annotations

from pathlib import Path

import command_line
import public_names
import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_every_public_name_has_an_entry():
    assert public_names.missing(REFERENCE) == []


def test_every_entry_is_a_name_that_exists():
    for name in public_names.entries(REFERENCE):
        public_names.resolve(name)


def test_a_public_name_without_an_entry_is_reported(tmp_path):
    for page in REFERENCE.glob("*.md"):
        text = page.read_text("utf-8").replace(".. autofunction:: sparse_attn.entmax_loss\n", "")
        (tmp_path / page.name).write_text(text, "utf-8")
    assert public_names.missing(tmp_path) == ["sparse_attn.entmax_loss", "sparse_attn.ops.entmax_loss"]


def test_every_config_file_and_key_is_explained():
    assert command_line.unexplained() == []


def test_every_config_file_and_command_is_on_its_page():
    page = command_line.configuration()
    assert len(command_line.files()) > 30
    for file in command_line.files():
        assert f"### {file.relative_to(command_line.CONFIGS)}\n" in page
    for command in ("train", "evaluate", "predict", "inspect", "calibrate", "compare"):
        assert f"## sparse-attn {command}\n" in command_line.commands()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("# sparse-attn train model=odd\nnot_an_argument: 3\n", ["odd.yaml: model.not_an_argument"]),
        ("# sparse-attn train model=odd\nnot_an_argument: 3 # layers\n", []),
        ("# no command\ndim: 3\n", ["odd.yaml"]),
        ("dim: 3\n", ["odd.yaml"]),
    ],
    ids=["a key without a meaning", "a comment is a meaning", "a file without its command", "a file without a comment"],
)
def test_a_key_or_file_without_explanation_is_reported(text, wrong, tmp_path, monkeypatch):
    file = tmp_path / "configs" / "model" / "odd.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    monkeypatch.setattr(command_line, "CONFIGS", tmp_path / "configs")
    command_line._home_comments.cache_clear()
    found = command_line.unexplained()
    command_line._home_comments.cache_clear()
    assert found == [f"configs/model/{line}" for line in wrong]


def test_defaults_and_comments_are_read_from_the_file():
    keys = {key.name: key for key in command_line.keys(command_line.CONFIGS / "train.yaml")}
    assert keys["optimizer.learning_rate"].default == "2.0e-3"
    assert keys["keep_checkpoints"].comment.startswith("number of last epochs")
    data = {key.name: key for key in command_line.keys(command_line.CONFIGS / "data" / "parallel.yaml")}
    assert data["data.sides"].default == "[source, target]"
    assert data["data.train"].default == "${data.path}/train.{side}"


def test_argument_descriptions_are_read_from_a_docstring():
    def function(first: int, second: int) -> None:
        """Do nothing.

        Args:
            first: A number: of any size,
                on two lines.
            second: Another.

        Returns:
            third: Nothing.
        """

    assert command_line.arguments(function) == {"first": "A number: of any size, on two lines.", "second": "Another."}
