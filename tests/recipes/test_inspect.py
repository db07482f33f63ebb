import csv
import shutil
from pathlib import Path

import pytest

from recipes.inspect import inspect
from recipes.launch import run_hydra
from recipes.report.write import read_course
from recipes.run import load_run
from sparse_attn import alpha_per_head

KINDS = (
    "encoder.layers.{}.self_attn",
    "decoder.layers.{}.self_attn",
    "decoder.layers.{}.multihead_attn",
)
LAYERS = [name.format(layer) for name in KINDS for layer in range(2)]
FILES = ["alpha.png", "alpha_course.png", "attention.png", "heads.csv", "report.html"]


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.report.plots.DPI", 50)


def run_inspect(*arguments: str) -> None:
    run_hydra("inspect", inspect, arguments=arguments)


def lines_after(out: str, start: str, count: int) -> list[list[str]]:
    lines = out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(start))
    return [line.split() for line in lines[first : first + count]]


def test_tables_and_files(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_inspect(f"run={run_folder}")
    out = capsys.readouterr().out
    assert max(map(len, (line for line in out.splitlines() if str(run_folder) not in line))) <= 80
    alpha = alpha_per_head(load_run(run_folder).task.model)[LAYERS[0]]
    assert lines_after(out, LAYERS[0], 1) == [[LAYERS[0], *(f"{value:.2f}" for value in alpha.tolist())]]
    # The kinds without a learnt α: softmax is α = 1 and dense, top-k shows its k.
    softmax, density = lines_after(out, LAYERS[2], 2)
    assert (softmax[1:], density) == (["1.00"] * 3, ["density", "100%", "100%", "100%"])
    assert lines_after(out, LAYERS[4], 1)[0][1:] == ["k=2"] * 3
    assert lines_after(out, "softmax, for comparison", 2)[1] == ["density", "100%", "100%", "100%"]
    assert "measured on 5 validation words" in out
    report = run_folder / "report"
    assert sorted(path.name for path in report.iterdir()) == FILES
    assert all(str(report / name) in out for name in FILES)
    with (report / "heads.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["layer"] for row in rows] == [layer for layer in LAYERS for _ in range(3)]
    assert [row["density"] for row in rows[6:12]] == ["1.0000"] * 6


def test_another_run_is_measured_on_the_same_words(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run_folder.parent / "other"
    shutil.copytree(run_folder, other)
    # Its own data are not needed.
    config = other / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("val.tsv", "gone.tsv"), encoding="utf-8")
    run_inspect(f"run={run_folder}", f"compare={other}")
    out = capsys.readouterr().out
    for layer in LAYERS:
        _, ours, theirs = lines_after(out, layer, 3)
        assert theirs == ["other", *ours[1:]]
    assert "density, other" in (run_folder / "report" / "report.html").read_text(encoding="utf-8")
    assert not (other / "report").exists()


def test_the_word_to_draw_can_be_chosen(run_folder: Path) -> None:
    run_inspect(f"run={run_folder}", "word=cabbac")
    page = (run_folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "Attention for one word: cabbac →" in page
    run_inspect(f"run={run_folder}")
    assert "Attention for one word: acacia →" in (run_folder / "report" / "report.html").read_text(encoding="utf-8")


def test_only_the_validation_words_are_needed(run_folder: Path) -> None:
    for split in ("train", "test"):
        (run_folder.parent / f"{split}.tsv").unlink()
    (run_folder / "alpha.csv").unlink()
    (run_folder / "results.json").unlink()  # an interrupted training has none
    run_inspect(f"run={run_folder}")
    report = run_folder / "report"
    assert sorted(path.name for path in report.iterdir()) == [name for name in FILES if name != "alpha_course.png"]
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "This run recorded no α." in page and "None: the training was stopped before its end." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "no run folder 'nowhere'"),
        (["compare=nowhere"], "no run folder 'nowhere'"),
        (["word=''"], "word must hold at least one character, got ''"),
        (["wrd=cab"], "unknown key 'wrd', did you mean 'word'?"),
    ],
)
def test_wrong_input_is_one_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = arguments if arguments[0].startswith("run=") else [f"run={run_folder}", *arguments]
    with pytest.raises(SystemExit) as stopped:
        run_inspect(*given)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sparse-attn inspect: {message}") and err.count("\n") == 1


def test_a_course_with_damaged_rows_is_drawn_without_them(run_folder: Path) -> None:
    file = run_folder / "alpha.csv"
    whole = read_course(file)
    file.write_bytes(file.read_bytes() + b"10,a\n\xff\xfe,a,0,1.5\n11,encoder.layers.0.self_attn,0,1.")
    assert read_course(file) == whole
    run_inspect(f"run={run_folder}")
    assert (run_folder / "report/alpha_course.png").exists()
