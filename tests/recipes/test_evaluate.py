import json
import shutil
from pathlib import Path

import pytest

from recipes.evaluate import evaluate
from recipes.launch import run_hydra
from recipes.run import load_run
from recipes.seq2seq.metrics import error_rates


def run_evaluate(*arguments: str) -> None:
    run_hydra("evaluate", evaluate, arguments=arguments)


def by_hand(run_folder: Path, file: Path) -> dict[str, float]:
    """Error rates of the words of a file, predicted one word at a time."""
    task = load_run(run_folder).task
    pairs = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    predictions = [task.predict_words([word])[0] for word, _ in pairs]
    return error_rates(predictions, [[reference.split()] for _, reference in pairs])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_evaluate(*arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("sparse-attn evaluate: ") and err.count("\n") == 1
    return err.removeprefix("sparse-attn evaluate: ").strip()


def test_both_splits_are_printed_and_written(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluate(f"run={run_folder}")
    val, test = (by_hand(run_folder, run_folder.parent / f"{split}.tsv") for split in ("val", "test"))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["PER", "%", "WER", "%", "loss", "support", "words"]
    assert out[1].split()[:3] == ["validation", f"{val['per']:.2f}", f"{val['wer']:.2f}"]
    assert out[2].split()[:3] == ["test", f"{test['per']:.2f}", f"{test['wer']:.2f}"]
    assert [line.split()[-1] for line in out[1:3]] == ["5", "4"]
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["checkpoint"] == "best"
    assert written["val/per"] == pytest.approx(val["per"])
    assert written["test/wer"] == pytest.approx(test["wer"])
    assert (written["val/words"], written["test/words"]) == (5, 4)


def test_one_split_needs_only_its_own_file(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (run_folder.parent / f"{split}.tsv").unlink()
    run_evaluate(f"run={run_folder}", "split=test", "checkpoint=last")
    assert "validation" not in capsys.readouterr().out
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert "val/per" not in written
    assert written["test/words"] == 4


def test_a_given_file_replaces_the_file_of_the_run(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("cab\tC A B\nxylo\tX Y\n", encoding="utf-8")
    run_evaluate(f"run={run_folder}", f"data.test={other}", "data.eval_batch_size=1")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["test/words"] == 2
    assert written["test/per"] == pytest.approx(by_hand(run_folder, other)["per"])
    assert written["val/words"] == 5
    assert written["data"]["test"] == str(other)


def test_a_limit_keeps_the_share_of_the_run_and_can_be_lifted(run_folder: Path) -> None:
    config = run_folder / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("  limit: null", "  limit: 3"), encoding="utf-8")
    run_evaluate(f"run={run_folder}", "split=test")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["test/words"] == 2  # half of the 6 training words, so half of the 4 test words
    run_evaluate(f"run={run_folder}", "split=test", "data.limit=null")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["test/words"] == 4


def test_a_run_on_cmudict_can_be_scored_on_a_given_file(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "config.yaml").write_text("data: {name: cmudict, limit: 100}\n", encoding="utf-8")
    file = run_folder.parent / "test.tsv"
    message = "no val file: the run was trained on cmudict, got data.test; give data.val=FILE or split=test"
    assert refused(capsys, f"run={run_folder}", f"data.test={file}") == message
    run_evaluate(f"run={run_folder}", f"data.test={file}", "split=test")
    written = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written["test/words"] == 4


def test_invalid_input_gives_a_one_line_error(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"run={run_folder}"
    assert refused(capsys, run, "split=train") == "split must be one of val, test, both, got 'train'"
    assert refused(capsys, run, "data.test=gone.tsv") == "cannot read the data file gone.tsv: No such file or directory"
    assert "unknown key 'data.language'" in refused(capsys, run, "data.language=hun")
    assert refused(capsys, run, "data.columns=3") == "data.columns must be list or null, got 3"
    assert refused(capsys) == "run has no value; give it as run=DIR, the run folder of a training"
    assert "no run folder 'nowhere'" in refused(capsys, "run=nowhere")
    assert "no checkpoint 'first'; checkpoints there: best, last" in refused(capsys, run, "checkpoint=first")
    assert refused(capsys, run, "data.limit=0") == "data.limit must be at least 1, got 0"


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_evaluate(f"run={run_folder}", f"output={tmp_path}/none/scores.json")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"sparse-attn evaluate: output must be a file in an existing folder, got '{tmp_path}/none/scores.json'\n"
    )
    assert (
        refused(capsys, f"run={run_folder}", f"output={tmp_path}")
        == f"output must be a file, got the folder '{tmp_path}'"
    )


def test_symbols_never_seen_in_training_are_reported(run_folder: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("cab\tC A B\nxylo\tC A\n", encoding="utf-8")
    run_evaluate(f"run={run_folder}", f"data.test={other}", "split=test")
    assert 'note: 1 of 2 test inputs hold symbols never seen in training: "x", "y", "l"' in capsys.readouterr().out


def test_a_damaged_or_missing_checkpoint_gives_a_one_line_error(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run_folder / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:1000])
    assert "cut short or damaged" in refused(capsys, f"run={run_folder}")
    shutil.rmtree(best.parent)
    assert "checkpoints there: none" in refused(capsys, f"run={run_folder}")


def test_no_file_is_written_to_the_current_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run_evaluate(f"run={run_folder}", "split=val")
    assert list(here.iterdir()) == []
