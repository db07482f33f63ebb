"""Resumed trainings: the same results as without an interruption, allowed changes, moved and damaged run folders."""

import json
import signal

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.launch import Interrupted
from recipes.resume import resume_arguments
from recipes.run import read_checkpoint
from recipes.seq2seq.task import Seq2SeqTask
from recipes.train import train


def resumed_config(folder, *overrides):
    """The configuration that ``sparse-attn train resume=FOLDER ...`` composes."""
    arguments, config = resume_arguments([f"resume={folder}", *overrides])
    with initialize_config_dir(str(config.parent), version_base="1.3"):
        return compose(config.stem, [argument for argument in arguments if not argument.startswith("hydra")])


@pytest.fixture
def interrupt(monkeypatch):
    """Raises KeyboardInterrupt at the beginning of a given training step."""
    step = Seq2SeqTask.training_step

    def at(when: int) -> None:
        def interrupted(self, *arguments):
            if self.global_step == when:
                raise KeyboardInterrupt
            return step(self, *arguments)

        monkeypatch.setattr(Seq2SeqTask, "training_step", interrupted)

    return at


def test_an_interrupted_and_resumed_training_equals_an_uninterrupted_training(
    tiny_config, tmp_path, interrupt, monkeypatch
):
    epochs = ("trainer.max_epochs=3", "model.dropout=0.3")
    straight = train(tiny_config(*epochs, f"paths.output_dir={tmp_path / 'straight'}"))

    with monkeypatch.context() as patch:
        interrupt(7)
        with pytest.raises(Interrupted) as stop:
            train(tiny_config(*epochs))
        patch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a second Ctrl-C must work"
    folder = tmp_path / "run"
    assert str(stop.value).endswith(f"to continue: sparse-attn train resume={folder}")
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 5
    assert "\n7,1.0" in (folder / "metrics.csv").read_text(), "steps after the checkpoint were logged and are repeated"
    monkeypatch.undo()
    torch.rand(3)
    resumed = train(resumed_config(folder))

    for name in ("metrics.csv", "alpha.csv"):
        assert (folder / name).read_text() == (tmp_path / "straight" / name).read_text()
    weights = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("run", "straight")]
    for key, tensor in weights[0]["state_dict"].items():
        assert torch.equal(tensor, weights[1]["state_dict"][key]), key
    assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}


def test_a_run_without_a_checkpoint_cannot_be_resumed(tiny_config, tmp_path, interrupt):
    interrupt(2)
    with pytest.raises(Interrupted, match=r"stopped before the end of the first epoch: .*run has no checkpoint"):
        train(tiny_config())
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'last'; checkpoints there: none"):
        resumed_config(tmp_path / "run")


def test_a_finished_run_can_be_prolonged_with_its_own_configuration(tiny_config, tmp_path):
    train(tiny_config("trainer.max_epochs=1", "model.attention=sparsemax"))
    folder = tmp_path / "run"
    before = (folder / "metrics.csv").read_text()
    train(resumed_config(folder, "trainer.max_epochs=2"))
    assert (folder / "metrics.csv").read_text().startswith(before)
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 10
    config = OmegaConf.load(folder / "config.yaml")
    assert (config.trainer.max_epochs, config.model.attention, config.resume) == (2, "sparsemax", None)
    versions = json.loads((folder / "versions.json").read_text())
    assert [record["torch"] for record in versions["resumed"]] == [versions["torch"]]


def test_a_moved_run_is_continued_in_its_new_place(tiny_config, tmp_path):
    train(tiny_config("trainer.max_epochs=1"))
    best = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["callbacks"]["BestAndLast"]["best"]
    moved = (tmp_path / "run").rename(tmp_path / "it's = moved")
    train(resumed_config(moved, "trainer.max_epochs=2"))
    assert not (tmp_path / "run").exists()
    assert OmegaConf.load(moved / "config.yaml").paths.output_dir == str(moved)
    assert read_checkpoint(moved / "checkpoints/last.ckpt")["callbacks"]["BestAndLast"]["best"] <= best


def test_the_best_score_is_restored(tiny_config, tmp_path, monkeypatch):
    rates = iter([10.0, 10.0, 10.0, 20.0])  # first epoch, its two final scores, second epoch
    monkeypatch.setattr("recipes.seq2seq.scores.edit_scores", lambda *_: {"per": next(rates, 99.0), "wer": 50.0})
    train(tiny_config("trainer.max_epochs=1"))
    train(resumed_config(tmp_path / "run", "trainer.max_epochs=2"))
    assert read_checkpoint(tmp_path / "run/checkpoints/best.ckpt")["global_step"] == 5


@pytest.mark.parametrize("arguments", [[], ["seed=1"], ["resume=null", "-m"], ["resume="]])
def test_without_resume_the_command_line_is_unchanged(arguments):
    assert resume_arguments(arguments) == (arguments, None)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "model=base",
            "got also 'model=base', which chooses a group; allowed are single keys of trainer, logger, decoding and ",
        ),
        ("model.attention=softmax", "got also 'model.attention=softmax'; allowed are"),
        ("data.path=x", "allowed are .*data.train, data.val, data.test, threads"),
        ("seed=1", "got also 'seed=1'; allowed"),
        ("keep_checkpoints=1", "with its own configuration, got also 'keep_checkpoints=1'; allowed"),
        ("optimizer.learning_rate=1", "got also"),
        ("~loss.label_smoothing", "got also"),
        ("hydra.run.dir=x", "resume continues a run in its own folder, got also 'hydra.run.dir=x'"),
        ("+experiment=g2p2020", "chooses a group"),
        ("hydra/launcher=basic", "chooses a group"),
        ("-m", "cannot be combined with -m"),
    ],
)
def test_arguments_that_resume_refuses(argument, message):
    with pytest.raises(ValueError, match=message):
        resume_arguments(["resume=runs/x", argument])


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_error_for_an_incomplete_checkpoint_has_its_name(tiny_config, tmp_path, kept):
    train(tiny_config("trainer.max_epochs=1"))
    file = tmp_path / "run/checkpoints/last.ckpt"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.ckpt \(\d+ bytes\) cannot be read: it is cut short or damaged"):
        resume_arguments([f"resume={tmp_path / 'run'}"])


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["+trainer.min_epochs=1", "~logger.csv", "data.test=x"]])
def test_arguments_that_resume_accepts(run_folder, arguments):
    own_folder = f'hydra.run.dir="{run_folder}"'  # Lightning passes this to the processes that it starts
    composed, _ = resume_arguments([f"resume={run_folder}", *arguments, own_folder])
    assert composed[: len(arguments) + 1] == [*arguments, own_folder]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.dim", 16, "resume continues the model of the checkpoint: dim must be 8, got 16"),
        ("trainer.max_epochs", 1, "trainer.max_epochs must be at least 2, the finished epochs, got 1"),
        ("data.train", "other.tsv", "the source symbols of the checkpoint.* new symbols .*'x'.* missing "),
    ],
)
def test_a_refused_change_does_not_change_the_run(tiny_config, tmp_path, key, value, message):
    train(tiny_config())
    folder = tmp_path / "run"
    (tmp_path / "other.tsv").write_text("xy\tA B\n", encoding="utf-8")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    cfg = resumed_config(folder)
    OmegaConf.update(cfg, key, str(tmp_path / value) if key == "data.train" else value)
    with pytest.raises(ValueError, match=message):
        train(cfg)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("name", "content"), [("versions.json", "{"), ("versions.json", "[]"), ("overrides.yaml", "a: [")]
)
def test_a_damaged_record_is_refused_before_any_change(tiny_config, tmp_path, name, content):
    train(tiny_config("trainer.max_epochs=1"))
    folder = tmp_path / "run"
    (folder / name).write_text(content, encoding="utf-8")
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} must hold .*, got damaged or other content"):
        train(resumed_config(folder, "trainer.max_epochs=2"))
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


def test_the_time_of_all_sessions_is_added_and_old_results_are_removed(tiny_config, tmp_path, interrupt):
    train(tiny_config("trainer.max_epochs=1"))
    folder = tmp_path / "run"
    last = folder / "checkpoints/last.ckpt"
    state = read_checkpoint(last)
    assert 0 < state["callbacks"]["BestAndLast"]["seconds"] < 60
    state["callbacks"]["BestAndLast"]["seconds"] = 1000.0
    torch.save(state, last)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(resumed_config(folder, "trainer.max_epochs=3"))
    assert (folder / "results.json").exists(), "results and checkpoint are of the first epoch"
    interrupt(12)
    with pytest.raises(Interrupted):
        train(resumed_config(folder))
    assert not (folder / "results.json").exists(), "the results of the first epoch must be removed"
    interrupt(-1)
    assert 1000 < train(resumed_config(folder))["seconds"] < 1060


def test_sigterm_has_the_effect_of_ctrl_c(tiny_config, tmp_path, monkeypatch):
    step = Seq2SeqTask.training_step

    def ended(self, *arguments):
        if self.global_step == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Seq2SeqTask, "training_step", ended)
    with pytest.raises(Interrupted, match="to continue: sparse-attn train resume="):
        train(tiny_config())


def test_a_run_stopped_before_its_first_checkpoint_can_start_again(tiny_config, tmp_path, interrupt):
    interrupt(2)
    with pytest.raises(Interrupted):
        train(tiny_config("logger=default"))
    interrupt(-1)
    train(tiny_config("logger=default", "trainer.max_epochs=1", "seed=4"))
    folder = tmp_path / "run"
    assert OmegaConf.load(folder / "config.yaml").seed == 4
    assert [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()[1:]] == list("12345")
    assert len(list((folder / "tensorboard").glob("events*"))) == 1
