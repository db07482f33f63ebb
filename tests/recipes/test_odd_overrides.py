"""Invalid values, damaged run folders and diverged trainings give a one-line error; a bug shows its traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.build import check_size
from recipes.launch import check_groups, run_hydra
from recipes.resume import resume_arguments
from recipes.train import main, train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.alpha_learning_rate=inf", "optimizer.alpha_learning_rate must be a finite number, got inf"),
        ("optimizer.weight_decay=nan", "optimizer.weight_decay must be a finite number, got nan"),
        ("model.dropout=inf", "model.dropout must be a finite number, got inf"),
        ("threads=9999", r"threads must be a whole number from 1 to \d+, the cores of this machine, .* got 9999"),
        ("model.dim=100000000", r"model (must fit|is too large) .*model.dim=100000000"),
        ("model.ff_dim=100000000000", r"model (must fit|is too large) .*model.ff_dim=100000000000"),
        ("model.dim=10000000000000", r"model (must fit|is too large)"),
        ("model.decoder_layers=10000000", r"model must fit into the memory of this machine, .*decoder_layers=10000000"),
        ("trainer.accelerator=tpu", "trainer: .*torch_xla"),
        ("trainer.precision=transformer-engine", "trainer: .*transformer_engine"),
        ("+trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("+trainer.accumulate_grad_batches=-1", "trainer.accumulate_grad_batches must be at least 1, got -1"),
        ("+trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be at least 1 or null, got 0"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be at least 0 or null, got -1"),
        ("trainer.max_epochs=-1", "trainer.max_epochs must be above 0 or null, got -1"),
        ("+trainer.val_check_interval=100", r"trainer: +`val_check_interval` \(100\) must be less than or equal"),
        ("+trainer.val_check_interval=0", "trainer.val_check_interval must be above 0 or null, got 0"),
        ("model.ff_dim=99999999999999999999", "model.ff_dim must be a number of at most 64 bits, got 9+$"),
        (
            "+trainer.accumulate_grad_batches=99999999999999999999",
            "trainer.accumulate_grad_batches must be a number of at most 64 bits, got 9+$",
        ),
        (
            "optimizer.warmup_steps=1000000000000",
            "optimizer.warmup_steps must be from 0 to 1,000,000 or null, got 1,000,000,000,000",
        ),
        ("model.dropout=1.0", r"model.dropout must lie in \[0, 0.99\], since nothing is learnt above; got 1.0"),
        ("loss.label_smoothing=0.999999", r"label_smoothing must lie in \[0, 0.9\], since .* got 0.999999"),
    ],
)
def test_an_invalid_or_extreme_value_gives_a_one_line_error(tiny_config, override, message):
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        train(tiny_config(override))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("command", "override"),
    [
        *(("train", override) for override in ("model=5", "callbacks=3", "logger=true", "logger=csv,null", "data=")),
        ("evaluate", "decoding=null"),
        ("predict", "decoding=5"),
    ],
)
def test_a_value_that_is_no_option_of_a_group_is_refused(command, override):
    with pytest.raises(ValueError, match=r"must be one of \w+(, \w+)*, got \w+"):
        check_groups(command, [override], sweep=True)


@pytest.mark.parametrize("override", ["data=5", "data=null"])
def test_evaluate_refuses_another_data_set_but_takes_single_keys_of_data(override):
    check_groups("evaluate", ["data.limit=5", "data.test=null"])
    with pytest.raises(ValueError, match=rf"data must be given key by key, as data.KEY=VALUE, got {override}"):
        check_groups("evaluate", [override])


def test_a_model_that_fits_into_memory_is_accepted():
    check_size({"dim": 256, "ff_dim": 1024, "encoder_layers": 4, "decoder_layers": 4}, 100, 10_000)


@pytest.mark.parametrize("argument", ["data=[1,2]", "model={a:1}", "hydra.run=5", "+hydra.job.name={}"])
def test_an_error_of_hydra_gives_one_line(argument, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparse-attn", argument, "trainer.max_epochs=0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_in_the_task_shows_a_traceback(tmp_path, monkeypatch):
    def task(cfg):
        raise KeyError("a bug")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="a bug"):
        run_hydra("train", task, arguments=[])


def test_a_callback_with_an_unknown_monitor_raises_an_error(tiny_config):
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    with pytest.raises(ValueError, match=r"trainer: Early stopping conditioned on metric `val/foo` .*`val/per`"):
        train(tiny_config(f"+callbacks.stop={{_target_: {stop}, monitor: val/foo}}"))


def test_a_diverged_training_keeps_the_last_finite_checkpoint(tiny_config, tmp_path, monkeypatch):
    import torch

    from recipes.run import read_checkpoint
    from recipes.seq2seq.scores import Scores

    losses = iter([2.0, float("nan")])
    found = Scores.metrics
    monkeypatch.setattr(Scores, "metrics", lambda self: {**found(self), "loss": next(losses)})
    with pytest.raises(ValueError, match=r"diverged in epoch 2: the validation loss .* got nan; .* rate is too"):
        train(tiny_config())
    for name in ("best", "last"):
        state = read_checkpoint(tmp_path / f"run/checkpoints/{name}.ckpt")
        assert state["global_step"] == 5
        assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())
    assert not (tmp_path / "run/results.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tiny_config, tmp_path, monkeypatch):
    from recipes.seq2seq.task import Seq2SeqTask

    def spoil(self):
        next(self.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Seq2SeqTask, "on_train_epoch_end", spoil, raising=False)
    with pytest.raises(ValueError, match=r"diverged in epoch 1: every weight must be finite, .*learning_rate=0.002"):
        train(tiny_config("+trainer.limit_val_batches=0"))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("content", ["", "a: [", "[]", "- 1", "data: 5"])
def test_resuming_a_damaged_configuration_gives_a_one_line_error(run_folder, content):
    (run_folder / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml must hold the configuration of a run, got damaged, empty or"):
        resume_arguments([f"resume={run_folder}"])


def test_resuming_without_the_state_of_the_training_gives_a_one_line_error(run_folder):
    (run_folder / "checkpoints/best.ckpt").replace(run_folder / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt must hold the state of a training .*; it has no epoch"):
        resume_arguments([f"resume={run_folder}"])


def sparse_attn(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = "from recipes.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, capture_output=True, **options)


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_error_of_predict_names_the_closed_stream(run_folder, closed):
    script = f'exec "{sys.executable}" -c "from recipes.cli import main; main()" predict "run={run_folder}" {closed}'
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, text=True, capture_output=True)
    what = {"<&-": "input is closed; give input=FILE", ">&-": "output is closed; give output=FILE"}[closed]
    assert (done.returncode, done.stderr) == (2, f"sparse-attn predict: standard {what}\n")


def test_a_word_that_is_not_ascii_is_read_in_the_c_locale(run_folder):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = sparse_attn("inspect", f"run={run_folder}", "word=bä", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "report.html" in done.stdout
