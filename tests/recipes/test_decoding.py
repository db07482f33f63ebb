"""Decoding options of the commands: n-best lists, scores, ensembles, averages, and the search table."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from recipes.ensemble import load_ensemble
from recipes.evaluate import evaluate
from recipes.launch import run_hydra
from recipes.predict import predict
from recipes.run import epoch_checkpoints, load_run, read_checkpoint
from recipes.seq2seq.decode import beam_search, exact_search
from recipes.seq2seq.metrics import error_rates
from recipes.seq2seq.task import Seq2SeqTask
from recipes.train import train

WORDS = ["cab", "abba", "baobab", "d"]


def run_command(name: str, *arguments: str) -> None:
    run_hydra(name, {"evaluate": evaluate, "predict": predict}[name], arguments=arguments)


def refused(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(name, *arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sparse-attn {name}: ") and err.count("\n") == 1
    return err.removeprefix(f"sparse-attn {name}: ").strip()


def predicted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[list[str]]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(WORDS).encode())))
    run_command("predict", *arguments)
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def other_run(run_folder: Path, tmp_path: Path) -> Path:
    """A run with the same vocabularies and other weights."""
    folder = tmp_path / "other"
    shutil.copytree(run_folder, folder)
    for name in ("best", "last"):
        state = read_checkpoint(folder / f"checkpoints/{name}.ckpt")
        state["state_dict"]["model.output.weight"] = state["state_dict"]["model.output.weight"].flip(1)
        torch.save(state, folder / f"checkpoints/{name}.ckpt")
    return folder


def ids(task: Seq2SeqTask, word: str) -> torch.Tensor:
    return torch.tensor([task.source_tokenizer.encode(word)])


@pytest.mark.parametrize("scores", [True, False])
def test_n_best_lists_are_printed_in_order_of_rank(run_folder, capsys, monkeypatch, scores) -> None:
    lines = predicted(
        capsys, monkeypatch, f"run={run_folder}", "decoding=beam", "n_best=3", f"scores={str(scores).lower()}"
    )
    task = load_run(run_folder).task
    expected = []
    for word in WORDS:
        found = beam_search(task.model, ids(task, word), beam_size=5, n_best=3, max_length=task.hparams["max_length"])[
            0
        ]
        for one in found:
            text = task.target_tokenizer.join(task.target_tokenizer.decode(one.tokens))
            expected.append([word, text, *([one.log_probability] if scores else [])])
    assert len(expected) > len(WORDS)
    assert [line[:2] for line in lines] == [row[:2] for row in expected]
    if scores:
        assert [float(line[2]) for line in lines] == pytest.approx([row[2] for row in expected], abs=1e-4)
    assert all(len(line) == 2 + scores for line in lines)


@pytest.mark.parametrize("decoding", ["greedy", "exact"])
def test_greedy_and_exact_decoding_give_one_prediction_and_score(run_folder, capsys, monkeypatch, decoding) -> None:
    lines = predicted(capsys, monkeypatch, f"run={run_folder}", f"decoding={decoding}", "scores=true")
    task = load_run(run_folder).task
    assert [line[0] for line in lines] == WORDS
    for word, text, score in lines:
        settings = {"max_length": task.hparams["max_length"]}
        if decoding == "greedy":
            best = beam_search(task.model, ids(task, word), beam_size=1, **settings)[0][0]
        else:
            best = exact_search(task.model, ids(task, word), budget=10_000, **settings)[0]
        assert text == task.target_tokenizer.join(task.target_tokenizer.decode(best.tokens))
        assert float(score) == pytest.approx(best.log_probability, abs=1e-4)


def test_an_empty_line_gives_one_empty_line(run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\ncab\n\n")))
    run_command("predict", f"run={run_folder}", "decoding=beam", "n_best=2", "scores=true")
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("", "", 4)


def test_evaluate_scores_the_outputs_of_beam_search(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("evaluate", f"run={run_folder}", "decoding=beam", "decoding.beam_size=3", "split=test")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["decoding"]["name"] == "beam" and written["decoding"]["beam_size"] == 3
    task = load_run(run_folder).task
    rows = [line.split("\t") for line in (run_folder.parent / "test.tsv").read_text(encoding="utf-8").splitlines()]
    predictions = [
        task.target_tokenizer.decode(
            beam_search(task.model, ids(task, word), beam_size=3, max_length=task.hparams["max_length"])[0][0].tokens
        )
        for word, _ in rows
    ]
    expected = error_rates(predictions, [[reference.split()] for _, reference in rows])
    assert written["test/per"] == pytest.approx(expected["per"])
    assert "exact search" not in capsys.readouterr().out


def test_exact_search_prints_its_results(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("evaluate", f"run={run_folder}", "decoding=exact", "decoding.budget=500", "split=test")
    out = capsys.readouterr().out
    assert "best hypothesis proved within 500 expansions, %" in out
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    task = load_run(run_folder).task
    words = [line.split("\t")[0] for line in (run_folder.parent / "test.tsv").read_text(encoding="utf-8").splitlines()]
    limit = {"max_length": task.hparams["max_length"]}
    exact = [exact_search(task.model, ids(task, word), budget=500, **limit)[0] for word in words]
    greedy = [beam_search(task.model, ids(task, word), beam_size=1, **limit)[0][0] for word in words]
    proved = [one.proved for one in exact]
    errors = [
        p and one.tokens != other.tokens and other.log_probability < one.log_probability - 1e-4
        for p, one, other in zip(proved, exact, greedy, strict=True)
    ]
    assert written["test/proved"] == pytest.approx(100 * sum(proved) / len(words))
    assert written["test/greedy_errors"] == pytest.approx(100 * sum(errors) / max(1, sum(proved)))
    assert written["test/single"] == 0
    assert written["test/empty_impossible"] == 0  # softmax gives every output a probability above zero
    assert written["test/empty_log_probability"] < 0 and written["test/empty_rank"] >= 1


def test_an_ensemble_averages_probabilities_and_has_no_loss(run_folder, other_run, capsys, monkeypatch) -> None:
    both = f"run=[{run_folder},{other_run}]"
    lines = predicted(capsys, monkeypatch, both, "decoding=beam", "scores=true")
    tasks = [load_run(folder).task for folder in (run_folder, other_run)]
    models = [task.model for task in tasks]
    for word, text, score in lines:
        best = beam_search(models, ids(tasks[0], word), beam_size=5, max_length=tasks[0].hparams["max_length"])[0][0]
        assert text == tasks[0].target_tokenizer.join(tasks[0].target_tokenizer.decode(best.tokens))
        assert float(score) == pytest.approx(best.log_probability, abs=1e-4)
    alone = predicted(capsys, monkeypatch, f"run={run_folder}", "decoding=beam", "scores=true")
    assert [line[2] for line in alone] != [line[2] for line in lines]

    run_command("evaluate", both, "split=test", "decoding=beam")
    assert "-" in capsys.readouterr().out.splitlines()[1].split()
    written = json.loads((run_folder / "ensemble.json").read_text(encoding="utf-8"))
    assert written["runs"] == [str(run_folder.resolve()), str(other_run.resolve())]
    assert {"test/per", "test/wer"} <= written.keys() and "test/loss" not in written
    assert not (run_folder / "evaluation.json").exists()


def test_an_ensemble_of_one_run_with_itself_is_the_run(run_folder, capsys, monkeypatch) -> None:
    alone, twice = (
        predicted(capsys, monkeypatch, run, "scores=true")
        for run in (f"run={run_folder}", f"run=[{run_folder},{run_folder}]")
    )
    assert [line[:2] for line in alone] == [line[:2] for line in twice]
    assert [float(line[2]) for line in alone] == pytest.approx([float(line[2]) for line in twice], abs=1e-5)


def test_an_ensemble_with_other_vocabularies_is_refused(run_folder, other_run, capsys) -> None:
    file = other_run / "checkpoints/best.ckpt"
    state = read_checkpoint(file)
    state["hyper_parameters"]["source_tokenizer"]["normalization"] = "NFD"
    torch.save(state, file)
    message = refused(capsys, "evaluate", f"run=[{run_folder},{other_run}]")
    assert message == (
        f"run must be folders of models with the same vocabularies, got another source vocabulary in "
        f"{other_run.resolve()} than in {run_folder.resolve()}: they differ in normalization"
    )


def test_the_last_checkpoints_are_kept_and_averaged(tiny_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    train(tiny_config("trainer.max_epochs=4", "keep_checkpoints=3", "decoding=beam", "decoding.beam_size=2"))
    folder = tmp_path / "run"
    files = epoch_checkpoints(folder)
    assert [file.name for file in files] == ["epoch_0002.ckpt", "epoch_0003.ckpt", "epoch_0004.ckpt"]
    states = [read_checkpoint(file)["state_dict"] for file in files]
    last = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(last[name], value) for name, value in states[-1].items())
    assert not any("optimizer" in key for key in read_checkpoint(files[0]))
    averaged = load_ensemble(folder, average=2).task.state_dict()
    for name, value in averaged.items():
        torch.testing.assert_close(value, (states[-2][name] + states[-1][name]) / 2)
    for name, value in load_ensemble(folder, average=1).task.state_dict().items():
        assert torch.equal(value, last[name])
    with pytest.raises(ValueError, match=r"average must be at most 3, the checkpoints of the last epochs in .*, got 4"):
        load_ensemble(folder, average=4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["decoding=beam", "decoding.beam_size=0"], "decoding.beam_size must be at least 1, got 0"),
        ("evaluate", ["decoding=exact", "decoding.budget=0"], "decoding.budget must be at least 1, got 0"),
        (
            "evaluate",
            ["decoding=beam", "decoding.beam_size=two"],
            "decoding.beam_size must be a whole number, got 'two'",
        ),
        ("evaluate", ["decoding=sample"], "unknown decoding 'sample'; allowed: beam, exact, greedy"),
        ("evaluate", ["average=0"], "average must be at least 1 or null, got 0"),
        ("evaluate", ["average=best"], "average must be a whole number or null, got 'best'"),
        ("evaluate", ["average=2"], "average must be at most 0, the checkpoints of the last epochs in "),
        (
            "predict",
            ["n_best=2"],
            "n_best must be 1 with decoding=greedy, which gives one hypothesis, got 2; decoding=beam",
        ),
        ("predict", ["decoding=beam", "n_best=6"], "n_best must be at most decoding.beam_size, 5, got 6"),
        ("predict", ["scores=yes please"], "scores must be true or false, got 'yes please'"),
    ],
)
def test_invalid_input_gives_a_one_line_error(run_folder, capsys, name, arguments, message) -> None:
    assert refused(capsys, name, f"run={run_folder}", *arguments).startswith(message)


def test_an_empty_list_of_runs_and_a_missing_run_are_refused_and_load_run_takes_one_folder(run_folder, capsys) -> None:
    assert (
        refused(capsys, "evaluate", "run=[]") == "run must be a run folder or a list of run folders, got an empty list"
    )
    assert "no run folder 'gone'" in refused(capsys, "predict", f"run=[{run_folder},gone]")
    with pytest.raises(ValueError, match=r"run must be a folder that a training has printed, .* got \['a', 'b'\]"):
        load_run(["a", "b"])  # type: ignore[arg-type]


def test_the_results_of_exact_search_are_finite(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("evaluate", f"run={run_folder}", "decoding=exact", "decoding.budget=2")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    numbers = [value for key, value in written.items() if key.startswith(("val/", "test/"))]
    assert all(math.isfinite(value) for value in numbers)
    assert 0 <= written["val/proved"] <= 100
