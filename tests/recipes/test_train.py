"""A complete small training: its results, output and files, and the arguments that it refuses."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from recipes.curves import read_rows
from recipes.launch import check_groups
from recipes.run import Run, load_run, read_checkpoint
from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.scores import score
from recipes.summary import print_comparison
from recipes.train import train

ROOT = Path(__file__).parents[2]
LAYERS = (
    "encoder.layers.0.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
)


def data_of(run: Run) -> Seq2SeqData:
    data = Seq2SeqData(**{key: value for key, value in run.config.data.items() if key != "path"})
    data.setup()
    return data


def test_a_run_folder_contains_all_files(tiny_config, tmp_path, capsys):
    results = train(tiny_config("seed=3"))
    folder = tmp_path / "run"
    there = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "overrides.yaml", "versions.json", "results.json", "metrics.csv", "alpha.csv"}
    assert there == {*files, "test_predictions.tsv", "checkpoints"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results) == {
        *(f"{s}/{m}" for s in ("val", "test") for m in ("loss", "support", "per", "wer", "accuracy", "edit_distance")),
        "seconds",
    }
    config = OmegaConf.load(folder / "config.yaml")
    assert (config.seed, config.data.seed, config.model.cross_attention) == (3, 3, "adaptive")
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert {"python", "lightning", "git_commit"} <= versions.keys()

    rows = read_rows(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert all(row["train/loss_step"] for row in rows)
    assert [row["step"] for row in rows if row["val/per"]] == ["5", "10"]
    alphas = read_rows(folder / "alpha.csv")
    assert list(alphas[0]) == ["step", "layer", "head", "alpha"]
    assert {(row["layer"], row["head"]) for row in alphas} == {(layer, str(h)) for layer in LAYERS for h in (0, 1)}
    assert [row["alpha"] for row in alphas[:6]] == ["1.500000"] * 6
    assert [row["step"] for row in alphas[::6]] == [str(step) for step in range(11)]

    run = load_run(folder)
    assert not run.task.training
    words = ["abc", "e"]
    assert run.task.predict_words(words) == [run.task.predict_words([word])[0] for word in words]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tsv: 40 training, 7 validation and 11 test words"
    assert lines[1].endswith(f"run folder {folder}")
    assert lines[2] == "2 epochs of 5 batches: 10 updates, 3 of them warm-up"
    assert lines[3].startswith("epoch 1/2  loss ")
    assert lines[4].startswith("epoch 2/2  loss ")
    text = "\n".join(lines)
    for expected in ("prediction", "reference", *LAYERS, "density", "validation", "test ", "PER", "WER"):
        assert expected in text
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["word", "prediction"])
    assert len(lines[start + 1 : lines.index("", start)]) == 10


def test_results_are_from_the_best_checkpoint_on_all_words(tiny_config, tmp_path):
    cfg = tiny_config("data.eval_limit=3", "trainer.max_epochs=1")
    results = train(cfg)
    run = load_run(tmp_path / "run", "best")
    data = data_of(run)
    for split, loader in {"val": data.full_val_dataloader(), "test": data.test_dataloader()}.items():
        scores = score(run.task, loader)
        assert len(scores.sources) == {"val": 7, "test": 11}[split]
        for name, value in scores.metrics().items():
            assert results[f"{split}/{name}"] == value


def test_the_best_checkpoint_is_of_the_epoch_with_the_lowest_error(tiny_config, tmp_path, monkeypatch):
    rates = iter([30.0, 20.0, 25.0])
    monkeypatch.setattr("recipes.seq2seq.scores.edit_scores", lambda *_: {"per": next(rates, 1.0), "wer": 50.0})
    results = train(tiny_config("trainer.max_epochs=3"))
    steps, losses = {}, {}
    for name in ("best", "last"):
        steps[name] = read_checkpoint(tmp_path / f"run/checkpoints/{name}.ckpt")["global_step"]
        run = load_run(tmp_path / "run", name)
        losses[name] = score(run.task, data_of(run).test_dataloader()).metrics()["loss"]
    assert steps == {"best": 10, "last": 15}
    assert results["test/loss"] == losses["best"] != losses["last"]


def test_the_same_seed_gives_the_same_numbers(tiny_config, tmp_path):
    found = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        torch.rand(len(found))
        results = train(tiny_config(f"paths.output_dir={tmp_path / name}", f"seed={seed}"))
        results.pop("seconds")
        found.append((results, (tmp_path / name / "metrics.csv").read_text()))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize("kind", ["softmax", "topk"])
def test_attention_is_set_for_all_layers_or_for_one_kind_of_layer(tiny_config, tmp_path, kind):
    train(tiny_config(f"model.attention={kind}", "model.decoder_attention=sparsemax", "trainer.max_epochs=1"))
    config = load_run(tmp_path / "run").config.model
    assert (config.encoder_attention, config.decoder_attention) == (kind, "sparsemax")
    finals = {row["layer"]: row["alpha"] for row in read_rows(tmp_path / "run/alpha.csv")}
    assert finals["decoder.layers.0.self_attn"] == "2.000000"
    assert finals.get("encoder.layers.0.self_attn") == {"softmax": "1.000000", "topk": None}[kind]


def test_the_default_loggers_write_into_the_run_folder(tiny_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config("logger=default", "trainer.max_epochs=1"))
    board = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("alpha/encoder.layers.0.self_attn/head1")] == list(range(6))
    assert [event.step for event in board.Histograms("alpha/encoder.layers.0.self_attn")] == list(range(6))
    assert len(board.Scalars("val/per")) == 1
    assert (tmp_path / "run/metrics.csv").exists()


@pytest.mark.filterwarnings("ignore")  # warnings of mlflow's dependencies
def test_mlflow_gets_alpha(tiny_config, tmp_path):
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    train(tiny_config("logger=mlflow", "trainer.max_epochs=1"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sparse-attn").experiment_id])
    values = client.get_metric_history(run.info.run_id, "alpha/encoder.layers.0.self_attn/head1")
    rows = [row for row in read_rows(tmp_path / "run/alpha.csv") if row["layer"].startswith("encoder")]
    expected = [float(row["alpha"]) for row in rows if row["head"] == "1"]
    assert [value.value for value in values] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # warnings of wandb's dependencies
def test_weights_and_biases_gets_alpha(tiny_config, tmp_path):
    wandb = pytest.importorskip("wandb")
    train(tiny_config("logger=wandb", "logger.wandb.offline=true", "trainer.max_epochs=1"))
    assert wandb.run.summary["alpha/encoder.layers.0.self_attn/head1"] > 1
    wandb.finish()
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_logger_without_its_package_is_refused_before_files_are_written(
    tiny_config, tmp_path, monkeypatch, logger, package
):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ValueError, match=rf"^logger\.{logger} needs the package {package}: pip install {package}$"):
        train(tiny_config(f"logger={logger}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=missing.tsv"], "missing.tsv"),
        (["model.attention=soft"], "softmax, entmax15, sparsemax, entmax, adaptive, topk, got 'soft'"),
        (["model.attention=topk", "model.k=0"], "k must be at least 1, got 0"),
        (["model.dim=9"], "model.dim must be a multiple of num_heads, got dim=9 and num_heads=2"),
        (["model.num_heads=0"], "model.num_heads must be at least 1, got 0"),
        (["data.metrics=[]"], r"data.metrics must hold at least one metric, and each once, got \[\]"),
        (["data.train="], "data.train must be a file, got ''"),
        (["data.train='{language}.tsv'"], r"data.languages must be given, since train holds \{language\}, got no"),
        (["data.columns=[source]"], "data.columns must hold source and target"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate must be above 0, got 0"),
        (["+loss.learning_rate=1"], "unknown key 'loss.learning_rate'; allowed: label_smoothing"),
        (["+optimizer.label_smoothing=0"], "unknown key 'optimizer.label_smoothing'.*; allowed: learning_rate, "),
        (["+optimizer.bleu_tokenize=zh"], "unknown key 'optimizer.bleu_tokenize'"),
        (["model.alpha=2.5"], r"alpha must be in \[1, 2\], .* got 2.5"),
        (["model.dropout=1.5"], "got 1.5"),
        (["model.dim=wide"], "model.dim must be a whole number, got 'wide'"),
        (["+model.width=3"], "unknown key 'model.width'; allowed: dim, "),
        (["+model.source_size=3"], "unknown key 'model.source_size'"),
        (["data.batch_size=2.5"], "data.batch_size must be a whole number, got 2.5"),
        (["data.normalization=NFX"], "normalization must be one of NFC, NFD, none, got 'NFX'"),
        (["optimizer.learning_rate=fast"], "optimizer.learning_rate must be a number, got 'fast'"),
        (["optimizer.max_steps=0"], "max_steps must be at least 1 or null, got 0"),
        (["optimizer.weight_decay=-1"], "weight_decay must be at least 0, got -1"),
        (["loss.label_smoothing=1"], r"label_smoothing must lie in \[0, 0.9\], since nothing is learnt above; got 1"),
        (["trainer.max_epochs=many"], "trainer.max_epochs must be a whole number or null, got 'many'"),
        (["trainer.max_epochs=0"], "trainer.max_epochs must be above 0 or null, got 0"),
        (["+trainer.min_epoch=1"], "unknown key 'trainer.min_epoch', did you mean 'min_epochs'"),
        (["+trainer.logger=true"], "unknown key 'trainer.logger'"),
        (["trainer.accelerator=abacus"], "trainer: .*abacus"),
        (["+trainer.overfit_batches=-3"], "trainer: (?!.*accelerator=).*overfit_batches=-3"),
        (["+trainer.val_check_interval=-3"], "trainer.val_check_interval must be above 0 or null, got -3"),
        (["~optimizer"], "the configuration must have seed, .*, got no optimizer"),
        (["optimizer=null"], "optimizer must be a group of keys, got None"),
        (["logger.csv=null"], r"logger.csv must be a group of keys with _target_ .*, got None"),
        (["paths.output_dir=null"], "paths.output_dir must be a folder, got None"),
        (["seed=1.5"], "seed must be a whole number from 0 to 4294967295, got 1.5"),
    ],
)
def test_invalid_values_are_refused_before_files_are_written(tiny_config, tmp_path, overrides, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        train(tiny_config(*overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "message"), [("", "empty"), ("abc\n", "bad.tsv:1: .*tab")])
def test_damaged_files_are_refused(tiny_config, tmp_path, content, message):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(f"data.val={tmp_path / 'bad.tsv'}"))


def test_a_folder_that_holds_a_run_is_refused(tiny_config, tmp_path):
    train(tiny_config("trainer.max_epochs=1"))
    before = (tmp_path / "run/results.json").read_text()
    with pytest.raises(FileExistsError, match="already holds a run; continue it with resume="):
        train(tiny_config("trainer.max_epochs=1"))
    assert (tmp_path / "run/results.json").read_text() == before


def test_a_diverged_training_stops(tiny_config):
    with pytest.raises(
        ValueError, match=r"must be finite, got nan at step [2-9]; a learning_rate below 1e\+38, or a weight"
    ):
        train(tiny_config("optimizer.learning_rate=1e38", "model.attention=softmax"))


def test_training_is_quiet_and_restores_the_warning_filters(tiny_config, capsys):
    before = list(warnings.filters)
    train(tiny_config("trainer.max_epochs=1"))
    assert capsys.readouterr().err == ""
    assert warnings.filters == before


def test_null_is_allowed_for_a_value_and_refused_for_a_group():
    check_groups("train", ["logger=csv", "resume=null", "optimizer.max_steps=null"])
    with pytest.raises(ValueError, match="logger must be one of csv, default, mlflow, wandb, got null"):
        check_groups("train", ["logger=null"])


def test_settings_that_do_not_fit_the_data_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"trainer: .*limit_train_batches"):
        train(tiny_config("trainer.limit_train_batches=0.001"))


def test_data_files_are_recorded_as_absolute_paths(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny_config("data.path=.", "data.test=test.tsv", "trainer.max_epochs=1"))
    monkeypatch.chdir(tmp_path.parent)
    data = load_run(tmp_path / "run").config.data
    assert (data.train, data.test) == (str(tmp_path / "train.tsv"), str(tmp_path / "test.tsv"))


def test_without_data_path_all_three_files_must_be_given(tiny_config, tmp_path):
    files = [f"data.{split}={tmp_path / split}.tsv" for split in ("train", "val", "test")]
    train(tiny_config("data.path=???", *files, "trainer.max_epochs=1"))
    assert "path" not in load_run(tmp_path / "run").config.data
    with pytest.raises(InterpolationToMissingValueError, match=r"data\.path"):
        train(tiny_config("data.path=???", *files[:2]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_training_runs_in_mixed_and_in_full_precision(tiny_config, precision):
    train(tiny_config(f"trainer.precision={precision}", "trainer.max_epochs=1"))


def test_accumulated_batches_share_one_row_of_alpha(tiny_config, tmp_path):
    train(tiny_config("+trainer.accumulate_grad_batches=2", "model.attention=adaptive"))
    rows = [(row["step"], row["layer"], row["head"]) for row in read_rows(tmp_path / "run/alpha.csv")]
    assert len(rows) == len(set(rows)) == 7 * 6


def test_log_every_n_steps_zero_logs_only_at_epochs(tiny_config, tmp_path):
    train(tiny_config("trainer.log_every_n_steps=0"))
    assert {row["step"] for row in read_rows(tmp_path / "run/alpha.csv")} == {"0", "5", "10"}


def test_the_learning_rate_of_an_epoch_with_few_updates_is_recorded(tiny_config, tmp_path):
    train(tiny_config("trainer.log_every_n_steps=50", "optimizer.warmup_steps=0"))
    rates = {row["step"]: float(row["train/learning_rate"]) for row in read_rows(tmp_path / "run/metrics.csv")}
    # The rates of the linear schedule at updates 5 and 10 of 10.
    assert rates == pytest.approx({"5": 2e-3 * 6 / 9, "10": 2e-3 * 1 / 9}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_bar_and_lines_fit_a_terminal_of_80_columns(tiny_arguments):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "recipes.train", *tiny_arguments("data.metrics=[accuracy]", "data.batch_size=1")]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end of a pseudo-terminal
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.startswith("epoch")]
    assert max(map(len, lines)) <= 80
    assert any(re.search(r"^epoch 2/2 ━+ 40/40 .* loss: \d\.\d\d accuracy: \d+\.\d\d$", line) for line in lines)


def test_data_are_not_read_as_markup(tiny_config, tmp_path, capsys):
    folder = tmp_path / "moved [b] run"
    cfg = tiny_config(f"paths.output_dir='{folder}'", "trainer.max_epochs=1")
    lines = [f"a{number}\t[/b] [red] :smile:\n" for number in range(10)]
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    train(cfg)
    shown = capsys.readouterr().out
    assert "[/b] [red] :smile:" in shown
    assert f"inspect run='{folder}'" in shown
    rates = {f"{split}/{name}": 1.0 for split in ("val", "test") for name in ("per", "wer")} | {"seconds": 1.0}
    print_comparison([(["a=[/b]"], rates), ([], rates)])
    assert "a=[/b]" in capsys.readouterr().out
