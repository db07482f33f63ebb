"""The shares of several processes together are the batch."""

import pytest
import torch

from recipes.processes import FOLDER, rank, set_environment, share_of_batch


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


def test_an_environment_variable_is_restored(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    import os

    with set_environment(FOLDER, "a"):
        with set_environment(FOLDER, "b"):
            assert os.environ[FOLDER] == "b"
        assert os.environ[FOLDER] == "a"
    assert FOLDER not in os.environ
