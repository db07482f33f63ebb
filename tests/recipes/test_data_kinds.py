"""train, evaluate, predict and inspect with features and languages, parallel text, and synthetic sequences."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from recipes.ensemble import load_ensemble
from recipes.evaluate import evaluate
from recipes.inspect import inspect
from recipes.launch import config_dir, run_hydra
from recipes.predict import predict
from recipes.train import train

TINY = [
    "model.dim=8",
    "model.num_heads=2",
    "model.ff_dim=16",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "logger=csv",
]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Trains a tiny model with the given arguments; the run folder is tmp_path / run."""

    def trained(*arguments: str) -> dict[str, float]:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return train(compose("train", [*TINY, f"paths.output_dir={tmp_path / 'run'}", *arguments]))

    return trained


def command(name: str, task: Callable, tmp_path: Path, *arguments: str) -> None:
    run_hydra(name, task, arguments=[f"run={tmp_path / 'run'}", *arguments])


@pytest.fixture
def languages(tmp_path: Path) -> list[str]:
    """Arguments for data in two languages, with words that are inflected by one feature."""
    rng = random.Random(0)
    for language in ("aa", "bb"):
        for split, count in {"train": 20, "val": 7, "test": 5}.items():
            words = ["".join(rng.choices("abcde", k=rng.randint(2, 6))) for _ in range(count)]
            lines = [f"{word}\t{word}{tag.lower()}\tV;{tag}" for word in words for tag in ("P", "Q")]
            (tmp_path / f"{language}.{split}").write_text("\n".join(lines), encoding="utf-8")
    files = [f"data.{split}='{tmp_path}/{{language}}.{split}'" for split in ("train", "val", "test")]
    return ["data=tsv", "data.columns=[source,target,features]", "data.target_split=characters", *files]


def test_four_commands_accept_features_and_languages(trained, languages, tmp_path, capsys, monkeypatch):
    trained(*languages, "data.languages=[bb,aa]", "model.language_dim=3", "data.title=two")
    assert "two: 80 training, 28 validation and 20 test words" in capsys.readouterr().out
    command("evaluate", evaluate, tmp_path, "split=test", "data.languages=[aa]")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test/words"] == 10
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"aa\tbad \tV;Q\n\nbb\tcab\tV\n")))
    command("predict", predict, tmp_path)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[-3:]] == [["aa", "bad", "V;Q"], [""], ["bb", "cab", "V"]]
    assert [len(line) for line in lines[-3:]] == [4, 1, 4]
    command("inspect", inspect, tmp_path)
    assert (tmp_path / "run" / "report" / "attention.png").is_file()


def test_a_line_for_predict_must_have_the_columns_of_the_input(trained, languages, tmp_path, capsys):
    trained(*languages, "data.languages=all")
    (tmp_path / "words.txt").write_text("aa\tbad\tV\naa\tbad\n", encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("predict", predict, tmp_path, f"input={tmp_path / 'words.txt'}")
    assert capsys.readouterr().err == (
        f"sparse-attn predict: {tmp_path / 'words.txt'}, line 2: a line must be "
        "language<TAB>source<TAB>features, got 'aa\\tbad'\n"
    )


def test_a_language_embedding_needs_languages(trained, languages):
    files = [argument.replace("{language}", "aa") for argument in languages]
    with pytest.raises(ValueError, match=r"^model\.language_dim needs data\.languages, got 3 and no languages$"):
        trained(*files, "model.language_dim=3")


def test_features_can_have_no_positions(trained, languages, tmp_path, capsys):
    trained(*languages, "data.languages=all", "model.feature_positions=false")
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["test/loss"]
    command("evaluate", evaluate, tmp_path, "split=test")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test/loss"] == pytest.approx(expected)


def test_features_without_positions_need_features(trained):
    message = r"^model\.feature_positions=false needs features in data\.columns, got data without features$"
    with pytest.raises(ValueError, match=message):
        trained("data=synthetic", "data.generate.train=20", "model.feature_positions=false")


@pytest.fixture
def parallel(tmp_path: Path) -> list[str]:
    """Arguments for compressed parallel text."""
    for split, count in {"train": 30, "val": 7, "test": 5}.items():
        for side, noun in (("en", "house"), ("de", "Haus")):
            text = "".join(f"{noun} {number} {noun}\n" for number in range(count))
            (tmp_path / f"{split}.{side}.gz").write_bytes(gzip.compress(text.encode()))
    files = [f"data.{split}='{tmp_path}/{split}.{{side}}.gz'" for split in ("train", "val", "test")]
    return ["data=parallel", "data.sides=[en,de]", "data.bpe_size=40", "data.batch_tokens=50", *files]


def test_four_commands_accept_parallel_text_with_subwords(trained, parallel, tmp_path, capsys):
    trained(*parallel)
    assert "parallel: 30 training, 7 validation and 5 test" in capsys.readouterr().out
    assert (tmp_path / "run" / "bpe_source.json").is_file()
    (tmp_path / "in.txt").write_text("house 3  house\n", encoding="utf-8")
    command("predict", predict, tmp_path, f"input={tmp_path / 'in.txt'}", f"output={tmp_path / 'out.txt'}")
    assert "▁" not in (tmp_path / "out.txt").read_text(encoding="utf-8")
    command("evaluate", evaluate, tmp_path, "split=test", f"data.test='{tmp_path}/val.{{side}}.gz'")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test/words"] == 7
    command("inspect", inspect, tmp_path)


def test_shared_embeddings_stay_shared_in_a_run_folder(trained, parallel, tmp_path):
    trained(*parallel, "model.share_embeddings=true", "trainer.max_epochs=2")
    for averaged in (None, 2):
        model = load_ensemble(str(tmp_path / "run"), "best", averaged).task.model
        assert model.source_embedding.tokens.weight is model.target_embedding.tokens.weight is model.output.weight
    command("evaluate", evaluate, tmp_path, "average=2", "decoding=beam")


def test_shared_embeddings_need_one_vocabulary(trained, parallel):
    message = r"^model\.share_embeddings needs data with one vocabulary .* data\.bpe_joint=true; got \d+ source and \d+"
    with pytest.raises(ValueError, match=message):
        trained(*parallel, "model.share_embeddings=true", "data.bpe_joint=false")


def test_train_and_evaluate_accept_synthetic_sequences(trained, tmp_path, capsys):
    sizes = ["length=5", "factors=[1,2]", "train=40", "val=7", "test=5", "task=retrieval"]
    trained("data=synthetic", "data.output_length=12", *(f"data.generate.{size}" for size in sizes))
    assert "retrieval: 40 training, 7 validation and 10 test" in capsys.readouterr().out
    command("evaluate", evaluate, tmp_path)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test/words"] == 10


def test_an_unknown_key_of_synthetic_data_raises_an_error(trained):
    with pytest.raises(ValueError, match=r"unknown key 'data\.generate\.size'.*allowed: task, length"):
        trained("data=synthetic", "+data.generate.size=3")
