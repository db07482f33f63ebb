"""Several processes: shares of a batch, process numbers, and training with torchrun or with the variables of srun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.curves import read_rows
from recipes.processes import FOLDER, is_one_of_several, rank, set_environment, share_of_batch

ROOT = Path(__file__).parents[2]
TORCHRUN = (
    "-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --node-rank={} --master-port={}"
)


@pytest.mark.parametrize(("rows", "count"), [(7, 2), (7, 3), (2, 3), (1, 5)])
def test_the_mean_of_the_weighted_means_is_the_mean_of_the_batch(rows, count):
    torch.manual_seed(0)
    target = torch.randint(1, 9, (rows, 11))
    for row in range(rows):
        target[row, 1 + row :] = 0
    batch = {"source": torch.rand(rows, 5), "target_in": target, "target_out": target, "other": "kept"}
    loss = torch.rand(9)

    def mean_loss(target):
        return loss[target[target != 0]].mean()

    shares = [share_of_batch(batch, rank, count, 0) for rank in range(count)]
    assert sum(weight for _, weight in shares) == pytest.approx(count)
    found = sum(weight * mean_loss(share["target_out"]) for share, weight in shares) / count
    assert found == pytest.approx(mean_loss(target).item(), rel=1e-6)
    for share, _ in shares:
        assert share["other"] == "kept"
        assert len(share["source"]) == len(share["target_out"]) >= 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"RANK": "3", "LOCAL_RANK": "1"}, 3), ({"SLURM_PROCID": "2"}, 2)],
)
def test_the_number_of_a_process(monkeypatch, environment, expected):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank() == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),  # a shell in a Slurm allocation, without srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"RANK": "1"}, True),
    ],
)
def test_a_process_knows_whether_others_were_started_with_it(monkeypatch, environment, expected):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_one_of_several() == expected


def srun(number: int) -> dict[str, str]:
    """The environment variables that srun sets for one of two tasks on two machines."""
    variables = {
        "JOB_ID": os.getpid(),  # Lightning derives the port from this number
        "JOB_NAME": "train",
        "NTASKS": 2,
        "STEP_NUM_TASKS": 2,
        "NTASKS_PER_NODE": 1,
        "NNODES": 2,
        "PROCID": number,
        "LOCALID": 0,
        "NODEID": number,
        "NODELIST": "localhost",
    }
    return {f"SLURM_{name}": str(value) for name, value in variables.items()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_machines_train_one_model_in_one_folder(tiny_arguments, tmp_path, launcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny = [argument for argument in tiny_arguments() if "output_dir" not in argument]
    several = ["trainer=ddp", "trainer.devices=1", "+trainer.num_nodes=2"]  # trainer=ddp has two devices

    def two(*more: str) -> list[subprocess.CompletedProcess[str]]:
        children = []
        for number in range(2):
            start = TORCHRUN.format(number, port).split() if launcher == "torchrun" else []
            environment = {**os.environ, **(srun(number) if launcher == "srun" else {})}
            command = [sys.executable, *start, "-m", "recipes.train", *several, *tiny, *more]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            children.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
        return [
            subprocess.CompletedProcess(child.args, child.returncode, *outputs)
            for child, outputs in [(child, child.communicate(timeout=300)) for child in children]
        ]

    first, second = two(f"hydra.run.dir={tmp_path / 'together'}")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("epoch 2/2") == 1
    assert "epoch" not in second.stdout
    rows = read_rows(tmp_path / "together/metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert (tmp_path / "together/results.json").exists()
    for refused in two():
        assert refused.returncode != 0
        assert "hydra.run.dir must be given where torchrun or srun starts several processes" in refused.stderr


def test_an_environment_variable_is_restored(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with set_environment(FOLDER, "a"):
        with set_environment(FOLDER, "b"):
            assert os.environ[FOLDER] == "b"
        assert os.environ[FOLDER] == "a"
    assert FOLDER not in os.environ
