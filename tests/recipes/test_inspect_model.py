"""`sparse-attn inspect model=DIR`: Hugging Face models in a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.inspect import inspect
from recipes.launch import run_hydra

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "die", "Katze", "saß"]
SIZES = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS, HEADS = 2, 3


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model with its tokenizer; returns the folder."""

    def save(kind: str, *, learnt: bool = False) -> Path:
        torch.manual_seed(0)
        if kind == "decoder":
            config = transformers.GPT2Config(**SIZES, n_embd=12, n_layer=LAYERS, n_head=HEADS, n_positions=11)
            model = transformers.GPT2LMHeadModel(config)
        elif kind == "encoder":
            sizes = {"hidden_size": 12, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
            model = transformers.BertModel(transformers.BertConfig(**SIZES, **sizes, intermediate_size=13))
        else:
            sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _SIDE.items()}
            sizes |= {"d_model": 12, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
            config = transformers.BartConfig(**SIZES, **sizes)
            model = transformers.BartForConditionalGeneration(config)
        if learnt:
            from sparse_attn.integrations.huggingface import add_alpha, register

            register()
            model.set_attn_implementation("entmax")
            add_alpha(model, alpha_init=[1.0, 1.25, 1.75])
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(words)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        return folder

    return save


_SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 13}


def run_inspect(*arguments: str) -> None:
    run_hydra("inspect", inspect, arguments=arguments)


def page_data(folder: Path) -> dict[str, Any]:
    page = (folder / "report" / "report.html").read_text(encoding="ascii")
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_encoder_or_a_decoder_is_reported_with_softmax(
    model_folder: Callable[..., Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(kind)
    run_inspect(f"model={folder}", "text=the cat sat")
    out = capsys.readouterr().out
    assert "α and attention density of every head" in out and "head roles" in out
    data = page_data(folder)
    assert [text["tokens"] for text in data["texts"]] == [["<s>", "the", "cat", "sat", "</s>"]]
    with (folder / "report" / "heads.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    # A dense model is shown with softmax.
    assert len(rows) == LAYERS * HEADS and {row["density"] for row in rows} == {"1.0"}
    assert {row["alpha"] for row in rows} == {"1.0"}
    numbers = json.loads((folder / "report" / "numbers.json").read_text(encoding="utf-8"))
    assert len(numbers["heads"]) == LAYERS * HEADS
    assert (folder / "report" / "attention.png").is_file()


def test_a_learnt_alpha_is_found(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder("decoder", learnt=True)
    run_inspect(f"model={folder}", "text=the cat sat", f"output={folder.parent / 'out'}", "figures=svg")
    assert "1.00   1.25   1.75" in capsys.readouterr().out
    assert sorted(path.name for path in (folder.parent / "out").iterdir()) == [
        "attention.svg",
        "heads.csv",
        "numbers.json",
        "report.html",
    ]
    run_inspect(f"model={folder}", "text=the cat sat", "attention=sparsemax")
    assert "2.00   2.00   2.00" in capsys.readouterr().out


def test_an_encoder_with_a_decoder_is_reported_with_alignments(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder("both")
    pairs = tmp_path / "pairs.txt"
    arguments = [f"model={folder}", "text=the cat", "target=die Katze saß", f"alignments={pairs}", "align.heads=any"]
    run_inspect(*arguments)
    data = page_data(folder)
    assert [layer["kind"] for layer in data["layers"]] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    cross = data["layers"][-1]["maps"][0]
    texts = [data["texts"][cross[side]]["tokens"] for side in ("queries", "keys")]
    assert texts == [["</s>", "<s>", "die", "Katze", "saß"], ["<s>", "the", "cat", "</s>"]]
    # Softmax gives weight to all pairs of the 2 input words and the 3 output words.
    assert sorted(pairs.read_text(encoding="utf-8").split()) == [f"{i}-{j}" for i in range(2) for j in range(3)]
    run_inspect(f"model={folder}", "text=the cat")  # the model generates the target
    assert "output tokens: </s>" in capsys.readouterr().out


def test_invalid_input_gives_a_one_line_error(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder("decoder")
    capsys.readouterr()  # removes transformers' messages about saving
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    wordless = tmp_path / "wordless"
    wordless.mkdir()
    for name in ("config.json", "model.safetensors"):
        (wordless / name).write_bytes((folder / name).read_bytes())
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    text = "text=the cat"
    for arguments, message in [
        (["model=nowhere", text], "no model folder 'nowhere'"),
        ([f"model={empty}", text], "model must be a folder with config.json"),
        ([f"model={bare}", text], "model must be a folder with weights (model.safetensors)"),
        ([f"model={broken}", text], "model must hold weights that fit its config"),
        ([f"model={wordless}", text], "model must be a folder with a tokenizer"),
        ([f"model={folder}"], 'text has no value; give it as text="..."'),
        ([f"model={folder}", "text=' '"], "text has no value"),
        (
            [f"model={folder}", f"text={'the ' * 20}"],
            "text must have at most the 11 tokens that the model reads, got 22",
        ),
        ([f"model={folder}", text, "target=die"], "target is for encoder-decoder models, got GPT2LMHeadModel"),
        ([f"model={folder}", text, "alignments=a"], "alignments need cross-attention, got GPT2LMHeadModel without"),
        ([f"model={folder}", text, "attention=hard"], "attention must be one of entmax, entmax15"),
        ([f"model={folder}", text, "words=[a]"], "words is only for run=DIR"),
        ([f"model={folder}", text, "worth=true"], "worth is for run=DIR"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run_inspect(*arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1, err
        assert err.startswith(f"sparse-attn inspect: {message}"), err
    assert not any((place / "report").exists() for place in (folder, empty, bare, broken, wordless))
