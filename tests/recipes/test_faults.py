"""A training that is killed, finds the disk full or runs in two processes ends like an undisturbed training."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from recipes.curves import read_rows
from recipes.resume import resume_arguments
from recipes.run import read_checkpoint
from recipes.train import train

ROOT = Path(__file__).parents[2]
SAME = ("metrics.csv", "alpha.csv")


def resumed_config(folder):
    """The configuration that ``sparse-attn train resume=FOLDER`` composes."""
    arguments, config = resume_arguments([f"resume={folder}"])
    with initialize_config_dir(str(config.parent), version_base="1.3"):
        return compose(config.stem, [argument for argument in arguments if not argument.startswith("hydra")])


def assert_same(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_text() == (other / name).read_text(), name
    for name in ("best", "last"):
        states = [read_checkpoint(folder / f"checkpoints/{name}.ckpt") for folder in (one, other)]
        for key, tensor in states[0]["state_dict"].items():
            assert torch.equal(tensor, states[1]["state_dict"][key]), key


def in_a_process(cfg, *, steps: int | None = None, delay: float = 0.0) -> bool:
    """Trains in a copy of this process; returns whether the training finished.

    With ``steps``, the process is killed ``delay`` seconds after it has written α of ``steps`` further steps.
    """
    curves = Path(cfg.resume or cfg.paths.output_dir) / "alpha.csv"
    before = written_steps(curves)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            train(cfg)
            status = 0
        finally:
            os._exit(status)
    while steps is not None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        if written_steps(curves) >= before + steps:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.005)
    return os.waitpid(child, 0)[1] == 0


def written_steps(curves: Path) -> int:
    """The number of steps with α in the file, the start included."""
    try:
        return len({row["step"] for row in read_rows(curves)})
    except (FileNotFoundError, ValueError, KeyError):
        return 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_training_killed_several_times_equals_an_uninterrupted_training(tiny_config, tmp_path):
    kills = int(os.environ.get("KILLS", "6"))
    epochs = 2 * kills + 4  # a process is killed within two epochs
    options = (f"trainer.max_epochs={epochs}", "model.dropout=0.2")
    begin = time.monotonic()
    assert in_a_process(tiny_config(*options, f"paths.output_dir={tmp_path / 'straight'}"))
    one_epoch = (time.monotonic() - begin) / epochs
    times = random.Random(0)
    folder, killed = tmp_path / "run", 0
    for _ in range(kills):
        going = (folder / "checkpoints/last.ckpt").exists()
        cfg = resumed_config(folder) if going else tiny_config(*options)
        # The process is killed at a random time in its first two epochs, possibly while it writes files.
        killed += not in_a_process(cfg, steps=times.choice((0, 1, 1, 1)), delay=times.uniform(0.0, one_epoch))
    assert killed == kills
    assert in_a_process(resumed_config(folder))
    assert_same(folder, tmp_path / "straight")
    assert (folder / "results.json").exists()


@pytest.mark.parametrize("fails_at", [1, 2, 4])  # an epoch saves three files
def test_error_for_a_full_disk_has_the_file_and_how_to_continue(tiny_config, tmp_path, monkeypatch, fails_at):
    straight = tmp_path / "straight"
    train(tiny_config(f"paths.output_dir={straight}"))
    save, saved = L.Trainer.save_checkpoint, []

    def full(self, file, *arguments, **options):
        saved.append(file)
        if len(saved) == fails_at:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "save_checkpoint", full)
        with pytest.raises(
            OSError, match=r"\[Errno 28\] No space left on device: .*/run/checkpoints/\w+\.ckpt"
        ) as told:
            train(tiny_config())
    folder = tmp_path / "run"
    assert not list(folder.rglob("*.tmp"))
    if fails_at <= 2:  # the first epoch saves best.ckpt and epoch_0001.ckpt before last.ckpt
        assert "no checkpoint to continue from; to train from the start, run the same command again" in str(told.value)
        train(tiny_config())
    else:
        assert (
            f"the checkpoint of the last finished epoch is kept, to continue: sparse-attn train resume={folder}"
            in str(told.value)
        )
        train(resumed_config(folder))
    assert_same(folder, straight)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers_as_one_and_can_be_resumed(tiny_arguments, tmp_path):
    def run(*more: str) -> str:
        command = [sys.executable, "-m", "recipes.train", *more]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiny = [
        argument
        for argument in tiny_arguments("model.dropout=0", "optimizer.max_steps=10")
        if "output_dir" not in argument
    ]
    run(*tiny, f"hydra.run.dir={tmp_path / 'one'}")
    output = run(*tiny, "trainer=ddp", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / 'two'}")
    assert output.count("epoch 1/1") == output.count("test words") - 1 == 1
    output = run(f"resume={tmp_path / 'two'}", "trainer.max_epochs=2")
    assert "continuing after step 5" in output
    rows = [read_rows(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [str(step) for step in range(1, 11)]
    for key in ("val/loss", "val/per"):
        one, two = ([float(row[key]) for row in table if row[key]] for table in rows)
        assert two == pytest.approx(one, rel=1e-4)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"one", "two"}
