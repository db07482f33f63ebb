"""Preparation of the command line for Hydra: paths and words are literal, flags can be anywhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipes import cli, evaluate, inspect
from recipes.arguments import quoted
from recipes.launch import run_hydra

ROOT = Path(__file__).parents[2]
ODD = (
    "naïve",
    "7",
    "run (1)",
    "a=b",
    "a,b",
    "it's",
    "x#y",
    "end\\",
    "${x}",
    "\\${x",
    "true",
    '"',
    "~/run",
    "[1",
    " a ",
)


def composed(name: str, *arguments: str) -> list[DictConfig]:
    """The configurations with which a command is called."""
    seen: list[DictConfig] = []
    run_hydra(name, lambda cfg: seen.append(cfg), arguments=arguments)
    return seen


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], object], status: int = 2) -> str:
    """The one-line error of a call."""
    with pytest.raises(SystemExit) as stop:
        call()
    output, error = capsys.readouterr()
    assert (stop.value.code, output, error.count("\n")) == (status, "", 1), error
    return error


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.mark.parametrize("text", [*ODD, "", "'", "\\'", "\\\\", "a\\${x}\\", "'\\\\'"])
def test_a_quoted_text_is_read_back_unchanged(text):
    value = OverridesParser.create().parse_override(f"key={quoted(text)}").value()
    assert OmegaConf.create({"key": value}).key == text


@pytest.mark.parametrize("text", ODD)
def test_paths_and_words_are_taken_literally(text):
    (cfg,) = composed("inspect", f"run={text}", f"word={text}", f"compare={text}")
    assert (cfg.run, cfg.word, cfg.compare) == (text, text, text)


def test_quotes_and_null_keep_their_meaning():
    (cfg,) = composed("inspect", "run='a b'", 'word="7"', "compare=null")
    assert (cfg.run, cfg.word, cfg.compare) == ("a b", "7", None)


def test_numbers_are_texts_in_the_keys_that_hold_paths_and_words():
    (cfg,) = composed("predict", "run=0", "input=wörter.txt", "output=5")
    assert (cfg.run, cfg.input, cfg.output) == ("0", "wörter.txt", "5")
    (cfg,) = composed("evaluate", "run=7", "data.test=5", "data.val=ü", "data.limit=5")
    assert (cfg.data.test, cfg.data.val, cfg.data.limit) == ("5", "ü", 5)


def test_run_folder_of_a_training_can_have_an_odd_name(tmp_path):
    seen: list[tuple[str, str]] = []
    arguments = ["hydra.run.dir=rü (1)", "data=tsv", "data.path=dü"]
    run_hydra("train", lambda cfg: seen.append((cfg.paths.output_dir, cfg.data.train)), arguments=arguments)
    assert seen == [(str(tmp_path / "rü (1)"), "dü/train.tsv")]


@pytest.mark.parametrize(
    ("value", "runs"),
    [
        ("a,b", ["a", "b"]),
        ("ü, 7", ["ü", "7"]),
        ("'a,b',c", ["a,b", "c"]),
        ("it's,b", ["it's", "b"]),
        ("'a,b'", ["a,b"]),
        ("choice(a,b)", ["a", "b"]),
        ("run (1)", ["run (1)"]),
    ],
)
def test_with_the_multirun_flag_commas_outside_quotes_give_several_runs(value, runs):
    assert [cfg.run for cfg in composed("evaluate", "-m", f"run={value}")] == runs


@pytest.mark.parametrize(
    "arguments",
    [["run=R", "split=val,test", "-m"], ["run=R", "-m", "split=val,test"], ["-m", "run=R", "split=val,test"]],
)
def test_a_flag_can_be_anywhere(arguments):
    assert [(cfg.run, cfg.split) for cfg in composed("evaluate", *arguments)] == [("R", "val"), ("R", "test")]


@pytest.mark.parametrize("arguments", [["--cfg", "job", "run=ü"], ["run=ü", "--cfg", "job"], ["--cfg=job", "run=ü"]])
def test_a_flag_keeps_its_value(arguments, capsys):
    composed("evaluate", *arguments)
    assert "run: ü\n" in capsys.readouterr().out


def test_only_several_runs_need_a_temporary_folder(capsys, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "folder/x")

    monkeypatch.setattr("recipes.launch.tempfile.TemporaryDirectory", full)
    assert [cfg.run for cfg in composed("evaluate", "run=R")] == ["R"]
    error = refused(capsys, lambda: composed("evaluate", "-m", "run=R,Q"))
    assert error == "sparse-attn evaluate: [Errno 28] No space left on device: 'folder/x'\n"


@pytest.mark.parametrize("other", [["--cfg", "job"], ["--info"], ["--run"]])
def test_two_flags_that_exclude_each_other_are_refused(other, capsys):
    error = refused(capsys, lambda: composed("train", "-m", *other, "seed=1,2"))
    assert "at most one of --multirun, -m, --run, -r, --cfg, " in error
    assert error.endswith(f" can be given, got -m {other[0]}\n")


def test_resolve_without_cfg_is_refused(capsys):
    assert "--resolve can only be given with --cfg" in refused(capsys, lambda: composed("train", "--resolve"))


def test_error_for_an_unknown_key_of_evaluate_lists_its_keys(capsys):
    error = refused(capsys, lambda: composed("evaluate", "foo=1"))
    assert (
        error
        == "sparse-attn evaluate: unknown key 'foo'; allowed: run, checkpoint, average, split, output, data, decoding\n"
    )


def test_a_required_group_cannot_be_deleted(capsys):
    error = refused(capsys, lambda: composed("train", "~model"))
    assert error == "sparse-attn train: model cannot be left out, got '~model'; choose one with model=NAME\n"


def test_ctrl_c_leaves_no_empty_run_folder(tmp_path, capsys):
    def task(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    refused(capsys, lambda: run_hydra("train", task, arguments=["hydra.run.dir=a"]), status=130)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("spec", "prefix"), [(None, ["train"]), (ModuleSpec("recipes.train", None), [])])
def test_the_task_sees_the_command_line_that_starts_the_program_again(spec, prefix, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["/bin/sparse-attn", "seed=3"])
    seen: list[list[str]] = []
    run_hydra("train", lambda cfg: seen.append(sys.argv))
    assert seen == [["/bin/sparse-attn", *prefix, "seed=3"]]


def test_cli_removes_the_command_from_sys_argv_and_keeps_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/sparse-attn", "evaluate", "foo=1"])
    refused(capsys, cli.main)
    assert sys.argv == ["/bin/sparse-attn", "foo=1"]


def test_ctrl_c_during_the_import_of_a_command_prints_one_line(monkeypatch, capsys):
    def import_module(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    monkeypatch.setattr(sys, "argv", ["sparse-attn", "predict", "run=R"])
    assert refused(capsys, cli.main, status=130) == "sparse-attn predict: stopped\n"


def test_help_is_printed_on_a_terminal_whose_encoding_lacks_alpha():
    done = subprocess.run(
        [sys.executable, "-c", "from recipes.cli import main; main()", "-h"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"scores and the ? of every head" in done.stdout


def test_brackets_in_a_folder_name_are_not_markup(run_folder, capsys):
    folder = run_folder.rename(run_folder.with_name("moved [b] run"))
    run_hydra("evaluate", evaluate.evaluate, arguments=[f"run={folder}", "split=val"])
    assert "written to moved [b] run/evaluation.json" in capsys.readouterr().out
    run_hydra("inspect", inspect.inspect, arguments=[f"run={folder}"])
    assert "  moved [b] run/report/" in capsys.readouterr().out
