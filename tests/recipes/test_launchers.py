"""Sweeps started by Hydra's plugins: several runs at a time, and a search for good values."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.sweep import read_outcomes

ROOT = Path(__file__).parents[2]
LAUNCHERS = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": []}


@pytest.fixture
def sweep(tiny_arguments, tmp_path):
    """Runs a sweep of a tiny model in the folder tmp_path / s."""
    tiny = [a for a in tiny_arguments("trainer.max_epochs=1") if not a.startswith(("paths.", "model.dim="))]

    def run(*more: str, status: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipes.train", "-m", *tiny, f"hydra.sweep.dir={tmp_path / 's'}", *more]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_launcher_runs_every_run_and_a_failed_run_is_recorded(sweep, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    done = sweep("model.dim=8,9", f"hydra/launcher={launcher}", *LAUNCHERS[launcher], status=1)
    assert "1 of 2 runs failed" in done.stderr
    first, second = (outcome for _, outcome in read_outcomes(tmp_path / "s"))
    assert "val/per" in first
    assert second == "model.dim must be a multiple of num_heads, got dim=9 and num_heads=2"


@pytest.mark.slow
def test_optuna_minimises_the_monitored_metric(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["model.dim=choice(8,9,16)", "optimizer.learning_rate=interval(0.0001,0.01)", "monitor=val/loss"]
    trials = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]
    sweep(*search, *trials, status=1)
    outcomes = [outcome for _, outcome in read_outcomes(tmp_path / "s")]
    losses = [outcome["val/loss"] for outcome in outcomes if not isinstance(outcome, str)]
    assert len(outcomes) == 4
    assert 0 < len(losses) < 4
    found = OmegaConf.load(tmp_path / "s/optimization_results.yaml")
    assert found.best_value == pytest.approx(min(losses))
