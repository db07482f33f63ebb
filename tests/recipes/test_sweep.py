"""Sweeps: failed and interrupted runs, refused folders and arguments, and the score that a sweeper minimises."""

import json
import sys

import pytest

from recipes import cli
from recipes.folders import claimed
from recipes.run import RESULTS
from recipes.seq2seq.task import Seq2SeqTask
from recipes.sweep import SWEEP, objective, read_outcomes


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, tiny_arguments):
    """Runs ``sparse-attn train`` with the tiny arguments (unless `alone`), followed by the given arguments."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)

    def start(*more: str, alone: bool = False) -> tuple[int, str, str]:
        tiny = [] if alone else [a for a in tiny_arguments("trainer.max_epochs=1") if "output_dir" not in a]
        monkeypatch.setattr(sys, "argv", ["sparse-attn", "train", *tiny, *more])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return start


def test_a_failed_run_does_not_stop_the_others_and_can_be_repeated(run, tmp_path):
    status, output, error = run("-m", "model.dim=8,9,10", "hydra.sweep.dir=s")
    assert status == 1
    assert error.splitlines() == [
        "sparse-attn train: run 1 failed: model.dim must be a multiple of num_heads, got dim=9 and num_heads=2",
        "sparse-attn train: 1 of 3 runs failed; to run the missing ones: sparse-attn train resume=s",
    ]
    table = [line.split() for line in output.splitlines()[-3:]]
    assert [row[0] for row in table] == ["model.dim=8", "model.dim=9", "model.dim=10"]
    assert " ".join(table[1]).endswith("- - - - - model.dim must be a multiple of num_heads, got dim=9 and num_heads=2")
    kept = (tmp_path / "s/0" / RESULTS).read_bytes()

    status, output, error = run("resume=s", alone=True)
    assert status == 1
    assert output.count("finished before") == 2
    assert "1 of 3 runs failed" in error
    assert (tmp_path / "s/0" / RESULTS).read_bytes() == kept


def test_an_interrupted_sweep_can_be_resumed(run, tmp_path, monkeypatch):
    step = Seq2SeqTask.training_step

    def interrupted(self, *arguments):
        if self.hparams["model"]["dim"] == 10 and self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Seq2SeqTask, "training_step", interrupted)
    status, _, error = run("-m", "model.dim=8,10,12", "trainer.max_epochs=2", "hydra.sweep.dir='my sweep'")
    assert (status, error.count("\n")) == (130, 1)
    assert error.endswith("to continue the sweep: sparse-attn train resume='my sweep'\n")
    assert [outcome for _, outcome in read_outcomes(tmp_path / "my sweep")][1:] == ["not finished"]

    monkeypatch.setattr(Seq2SeqTask, "training_step", step)
    status, output, error = run("resume=my sweep", alone=True)
    assert (status, error) == (0, "")
    assert output.count("finished before") == 1
    assert "continuing after step 5" in output
    found = read_outcomes(tmp_path / "my sweep")
    assert [[x for x in changes if x.startswith("model.dim=")][-1] for changes, _ in found] == [
        f"model.dim={dim}" for dim in (8, 10, 12)
    ]
    straight = run("-m", "model.dim=10", "trainer.max_epochs=2", "hydra.sweep.dir=straight")
    assert straight[0] == 0
    assert {**read_outcomes(tmp_path / "straight")[0][1], "seconds": 0} == {**found[1][1], "seconds": 0}


def test_another_sweep_in_the_same_folder_is_refused_without_changes(run, tmp_path):
    run("-m", "model.dim=8", "hydra.sweep.dir=s")
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    status, _, error = run("-m", "model.dim=10", "hydra.sweep.dir=s")
    assert (status, error.count("\n")) == (2, 1)
    assert "s already holds another sweep (data=tsv " in error
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()} == before


def test_a_sweep_folder_in_use_is_refused(run, tmp_path):
    with claimed(tmp_path / "s"):
        status, _, error = run("-m", "model.dim=8", "hydra.sweep.dir=s")
    assert (status, error.count("\n")) == (2, 1)
    assert "another process uses s" in error


def test_a_wrong_command_line_creates_no_sweep(run, tmp_path):
    status, _, error = run("-m", "models.dim=8,10")
    assert (status, error.count("\n")) == (2, 1)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(("content", "more"), [("{", []), ("[]", []), (json.dumps({"arguments": []}), ["seed=1"])])
def test_a_damaged_sweep_or_other_arguments_give_a_one_line_error(run, tmp_path, content, more):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / SWEEP).write_text(content)
    status, _, error = run("resume=s", *more, alone=True)
    assert (status, error.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        ("val/wer", 40.0),
        ("val/wer/hun", 10.0),
        ("val/wer/hun/old", 20.0),
        ("val/accuracy/jpn", -30.0),
        ("val/loss", 1.5),
    ],
)
def test_a_sweeper_minimises_the_monitored_score(tmp_path, monitor, expected):
    (tmp_path / "config.yaml").write_text(f"monitor: {monitor}\n", encoding="utf-8")
    scores = {"wer": 40.0, "wer/hun": 10.0, "wer/hun/old": 20.0, "accuracy": 60.0, "accuracy/jpn": 30.0, "loss": 1.5}
    results = {
        f"{split}/{name}": value + (split == "test") for split in ("val", "test") for name, value in scores.items()
    }
    assert objective(tmp_path, results) == expected
