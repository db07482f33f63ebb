"""`sparse-attn calibrate model=DIR text=FILE`: the table, the files, a saved state, blocks of text, wrong input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.calibrate import calibrate, read_blocks
from recipes.launch import run_hydra

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = " ".join(f"{first}{second}" for first in "aeiou" for second in "bcdfghjklmnpqrstvwxyz") * 3


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model with its tokenizer, and a text beside the model; returns the folder of the model."""

    def save(kind: str) -> Path:
        torch.manual_seed(0)
        words = tokenizers.ByteLevelBPETokenizer()
        words.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<pad>", "<mask>"])
        words.save(str(tmp_path / "words.json"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "words.json"), pad_token="<pad>", mask_token="<mask>"
        )
        sizes = {"vocab_size": 300, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
        if kind == "causal":
            config = transformers.GPT2Config(**sizes, n_positions=31, initializer_range=0.5)
            model = transformers.GPT2LMHeadModel(config)
        elif kind == "offset":
            config = transformers.RobertaConfig(**sizes, intermediate_size=13, max_position_embeddings=31)
            model = transformers.RobertaForMaskedLM(config)
        else:
            config = transformers.BertConfig(**sizes, intermediate_size=13, max_position_embeddings=31)
            config.initializer_range = 0.5
            model = {"masked": transformers.BertForMaskedLM, "plain": transformers.BertModel}[kind](config)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        return tmp_path / "model"

    return save


def run(folder: Path, *arguments: str) -> None:
    run_hydra("calibrate", calibrate, arguments=[f"model={folder}", f"text={folder.parent / 'text.txt'}", *arguments])


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_calibrate_prints_a_table_and_writes_files(kind, folder, capsys, tmp_path):
    model, files = folder(kind), (tmp_path / "alpha.json", tmp_path / "sparse")
    run(model, "density=0.3", "batches=2", f"output={files[0]}", f"save={files[1]}")
    out, err = capsys.readouterr()
    assert "α and attention density of every head" in out and err.count("calibrate: pass") == 8
    before, after = map(float, re.search(r"loss ([\d.]+) dense, ([\d.]+) with these α", out).groups())
    assert before != after
    assert float(re.search(r"density ([\d.]+), the mean", out)[1]) == pytest.approx(0.3, abs=0.03)
    alpha = json.loads(files[0].read_text())
    assert [len(values) for values in alpha.values()] == [3, 3]

    from sparse_attn.integrations.huggingface import load_alpha

    loader = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForMaskedLM
    again = loader.from_pretrained(files[1], attn_implementation="entmax")
    assert {n: a.alpha.tolist() for n, a in load_alpha(again, files[1]).items()} == {
        name: pytest.approx(values, abs=1e-6) for name, values in alpha.items()
    }


def test_a_second_calibration_with_the_same_state_repeats_no_pass(folder, capsys, tmp_path):
    model, state = folder("causal"), tmp_path / "state.json"
    run(model, "loss_increase=0.1", "per=layer", f"state={state}")
    first = capsys.readouterr()
    run(model, "loss_increase=0.1", "per=layer", f"state={state}")
    second = capsys.readouterr()
    assert second.out == first.out and "pass" in first.err and "pass" not in second.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["density=0"], "density must be in (0, 1], got 0"),
        ([], "exactly one of density and loss_increase must be given, got None and None"),
        (["density=0.2", "per=model"], "per must be 'head' or 'layer', got 'model'"),
        (["density=0.2", "tokens=1"], "tokens must be a whole number of at least 2, got 1"),
        (["density=0.2", "batches=0.5"], "batches must be a whole number of at least 1, got 0.5"),
        (["density=0.2", "text=none.txt"], "no text file 'none.txt'"),
        (["density=0.2", "text=null"], "text has no value; give it as text=FILE"),
        (["density=0.2", "model=none"], "no model folder 'none'"),
    ],
    ids=str,
)
def test_wrong_input_gives_a_one_line_error(arguments, message, folder, capsys):
    model = folder("causal")
    capsys.readouterr()  # discards the progress bar of `save_pretrained`
    with pytest.raises(SystemExit, match="2"):
        run(model, *arguments)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("sparse-attn calibrate: ") and message in err


def test_a_model_without_a_language_model_head_and_an_empty_text_are_refused(folder, capsys):
    model = folder("plain")
    with pytest.raises(SystemExit, match="2"):
        run(model, "density=0.2")
    assert "model must be a causal or a masked language model, got BertModel" in capsys.readouterr().err
    (model.parent / "text.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        run(model, "density=0.2")
    assert "text must be a file with text" in capsys.readouterr().err


def test_blocks_fit_a_model_whose_first_positions_are_not_used_by_tokens(folder, capsys):
    model = folder("offset")
    run(model, "density=0.5", "tokens=100", "batches=2", "batch_size=2")
    # Positions 0 and 1 are not used by tokens: 29 of 31 remain.
    assert f"on {2 * 2 * 29} tokens" in capsys.readouterr().out


class Words:
    """A tokenizer with one token per word."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("internationalization " * 500, [[1] * 8] * 4),
        (" " * 2000 + "a bc def", [[1, 1, 1]]),
    ],
)
def test_a_text_with_long_words_or_much_white_space_gives_blocks(text, expected):
    """At first, 12 characters are read for each token that is needed; here, a token needs more."""
    assert read_blocks(Words(), text, length=8, number=4) == expected


def test_a_long_text_with_one_token_raises_an_error():
    with pytest.raises(ValueError, match="text must hold at least 2 tokens, got 1"):
        read_blocks(Words(), "a" + " " * 5000, length=8, number=4)
