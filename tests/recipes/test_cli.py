"""The command line as users see it: help texts, error messages, several runs, interruption by Ctrl-C."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from recipes import cli
from recipes.launch import Interrupted, reported, run_hydra
from recipes.train import main as train_main
from recipes.train import train
from sparse_attn.checks import check_k

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process in an empty folder; returns exit status, output and error output."""

    def run(*arguments: str, main: Callable[[], None] = cli.main) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sparse-attn", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return run


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    return text


def test_help_names_every_command(command):
    status, output, _ = command("-h")
    assert status == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in output
    assert output == command("--help")[1]


def test_without_a_command_the_help_is_shown_and_the_status_is_2(command):
    status, output, _ = command()
    assert (status, output) == (2, cli.usage())


def test_version(command):
    from sparse_attn import __version__

    assert command("--version")[:2] == (0, f"sparse-attn {__version__}\n")


def test_an_unknown_command_gives_a_one_line_error(command):
    status, output, error = command("trian")
    assert (status, output) == (2, "")
    assert one_line(error).startswith("sparse-attn: unknown command 'trian', did you mean 'train'?; allowed: ")


def test_error_for_a_missing_extra_names_the_pip_command(command, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    status, _, error = command("train")
    assert status == 2
    assert 'pip install "sparse-attn[recipes]"' in one_line(error)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_train_help_lists_groups_and_keys(command, flag):
    status, output, error = command("train", flag)
    assert (status, error) == (0, "")
    assert "model.attention=KIND" in output
    assert "experiment: characters, g2p2020" in output
    assert "alpha_learning_rate: " in output
    assert "Hydra" not in output


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiment=g2p2019", "unknown experiment 'g2p2019', did you mean 'g2p2021'?; allowed: characters, "),
        ("model=huge", "unknown model 'huge'; allowed: base, small"),
        ("seeds=1", "unknown key 'seeds', did you mean 'seed'?; allowed: callbacks, data, decoding, experiment, "),
        ("trainer.epochs=1", "unknown key 'trainer.epochs', did you mean 'max_epochs'?; allowed in trainer: "),
        ("seed.x=1", "'seed.x' cannot be set: seed is a value, not a group of keys"),
        ("seed", "'seed' is not of the form key=value"),
        ("=1", "'=1' is not of the form key=value"),
        ("seed=[1", "the value of seed cannot be read, got '[1'; close brackets and quotation marks, and put a text "),
        ("+trainer.x='1", 'the value of trainer.x cannot be read, got "\'1"; close brackets'),
        ("data=tsv data.path=", "data.path has no value; give it as data.path=DIR, the folder of the data files"),
        ("data=tsv data.path=null", "data.path has no value; give it as data.path=DIR, the folder of the data files"),
        ("--sweep", "unknown option '--sweep'; allowed: --help, "),
        ("data=tsv", "data.path has no value; give it as data.path=DIR, the folder of the data files"),
        ("+speed=1", "unknown key 'speed'; allowed: seed, resume, threads, keep_checkpoints, data, "),
        ("seed=-1", "seed must be a whole number from 0 to 4294967295, got -1"),
        ("resume=nowhere", "no run folder 'nowhere'; give the folder a training has printed"),
        ("resume=.", "'.' is not a run folder: it has no config.yaml"),
    ],
)  # fmt: skip
def test_a_wrong_argument_of_train_gives_a_one_line_error(command, tmp_path, argument, message):
    status, output, error = command("train", *argument.split(" "))
    assert (status, output) == (2, "")
    assert one_line(error).startswith(f"sparse-attn train: {message}")
    assert not list(tmp_path.glob("runs/*")), "an invalid argument creates no run folder"


def test_error_for_a_missing_language_says_how_to_give_it(command):
    _, _, error = command("train", "experiment=g2p2020", "data.path=x")
    assert "data.language has no value; give it as data.language=CODE" in one_line(error)


def test_the_main_function_of_train_gives_the_same_errors(command):
    status, _, error = command("foo=1", main=train_main)
    assert status == 2
    assert one_line(error).startswith("sparse-attn train: unknown key 'foo'; allowed: ")


def report(error: BaseException) -> None:
    with reported("train"):
        raise error


def check_k_in_a_command(k: int) -> None:
    with reported("train"):
        check_k(k)


def test_an_error_raised_by_this_project_becomes_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        check_k_in_a_command(0)
    assert capsys.readouterr().err == "sparse-attn train: k must be at least 1, got 0\n"


def test_an_unexpected_error_is_not_caught():
    with pytest.raises(RuntimeError, match="shapes"):
        report(RuntimeError("shapes"))
    with pytest.raises(ValueError, match="invalid literal"), reported("train"):
        int("three")  # raised by Python, not by our code: such an error counts as a bug
    with pytest.raises(TypeError), reported("train"):
        train()  # type: ignore[call-arg]


def test_a_message_of_several_lines_becomes_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        report(FileNotFoundError("no\n  such file"))
    assert capsys.readouterr().err == "sparse-attn train: no such file\n"


def test_an_environment_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="k must be"):
        check_k_in_a_command(0)


def test_the_message_of_an_interruption_says_how_to_continue(capsys):
    with pytest.raises(SystemExit, match="130"):
        report(Interrupted("stopped; to continue: sparse-attn train resume=DIR"))
    assert capsys.readouterr().err == "sparse-attn train: stopped; to continue: sparse-attn train resume=DIR\n"


def test_an_error_of_the_task_prints_only_one_line(command, capsys):
    def failing(cfg: DictConfig) -> None:
        check_k(cfg.seed)

    status, output, error = command(main=lambda: run_hydra("train", failing))
    assert (status, output, error) == (2, "", "sparse-attn train: k must be at least 1, got 0\n")


def test_multirun_runs_every_combination_in_folders_of_one_sweep(command, tmp_path):
    seen = []

    def task(cfg: DictConfig) -> None:
        seen.append((cfg.model.cross_attention, Path(cfg.paths.output_dir)))

    arguments = ["-m", "model.attention=softmax,topk", "hydra.sweep.dir=sweep"]
    assert command(main=lambda: run_hydra("train", task, arguments=arguments)) == (0, "", "")
    assert seen == [("softmax", tmp_path / "sweep" / "0"), ("topk", tmp_path / "sweep" / "1")]


def test_hydra_works_with_the_help_text_check_of_python_3_14(command, monkeypatch):
    def check_help(parser, action):
        if action.help and hasattr(parser, "_get_formatter"):
            try:
                parser._get_formatter()._expand_help(action)
            except (ValueError, TypeError, KeyError):
                raise ValueError("badly formed help string") from None

    def add_argument(container, *args, **kwargs):
        action = before(container, *args, **kwargs)
        container._check_help(action)
        return action

    before = argparse._ActionsContainer.add_argument
    monkeypatch.setattr(argparse._ActionsContainer, "_check_help", check_help, raising=False)
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", add_argument)
    with pytest.raises(ValueError, match="badly formed help string"):
        hydra._internal.utils.get_args_parser()
    seen = []
    assert command(main=lambda: run_hydra("train", lambda cfg: seen.append(cfg.seed), arguments=["seed=5"]))[0] == 0
    assert seen == [5]


def test_multirun_of_inspect_creates_no_files(command, tmp_path):
    seen = []
    status = command(main=lambda: run_hydra("inspect", lambda cfg: seen.append(cfg.run), arguments=["-m", "run=a,b"]))
    assert status == (0, "", "") and seen == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_a_multirun_of_train_ends_with_a_table_of_the_runs(command, tiny_arguments, tmp_path):
    arguments = tiny_arguments("trainer.max_epochs=1", "model.attention=softmax,sparsemax", "hydra.sweep.dir=sweep")
    arguments.remove(next(argument for argument in arguments if argument.startswith("paths.output_dir=")))
    status, output, error = command("train", "-m", *arguments)
    assert (status, error) == (0, "")
    assert "run 1: " in output
    *_, softmax, sparsemax = output.splitlines()
    assert softmax.split()[0] == "model.attention=softmax"
    assert sparsemax.split()[0] == "model.attention=sparsemax"
    results = json.loads((tmp_path / "sweep/1/results.json").read_text())
    rates = [f"{results[f'{split}/{name}']:.2f}" for split in ("val", "test") for name in ("per", "wer")]
    assert sparsemax.split()[1:5] == rates


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_continue(tiny_arguments, tmp_path):
    """Starts a separate process and sends SIGINT to it; the other tests of this file run in one process."""
    arguments = tiny_arguments("trainer.max_epochs=10000", "hydra.run.dir=a run")
    arguments.remove(next(argument for argument in arguments if argument.startswith("paths.output_dir=")))
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "a run/checkpoints/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == (
        "sparse-attn train: stopped; the checkpoint of the last finished epoch is kept, "
        "to continue: sparse-attn train resume='a run'\n"
    )
    assert "epoch 1/10000  loss " in output
