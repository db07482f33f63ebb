"""The table of runs, for run folders written by hand with known numbers; and the paired bootstrap."""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from recipes import compare as compare_module
from recipes.bootstrap import paired_bootstrap
from recipes.bootstrap import statistics as statistics_of
from recipes.compare import find_runs, group_runs
from recipes.launch import run_hydra
from recipes.predictions import PREDICTIONS, Prediction, read_predictions
from recipes.report.comparison import escaped

WORDS = 40


def predictions(right: int, *, prefix: str = "w") -> list[Prediction]:
    """Predictions for forty words of four phones: the first ``right`` are correct, the others have one wrong phone."""
    return [
        Prediction(f"{prefix}{word}", "A B C D", "A B C D" if word < right else "A B C E", int(word >= right), 4, "")
        for word in range(WORDS)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder into the sweep."""

    def run(number: int, attention: str, seed: int, right: int, language: str = "hun", prefix: str = "w") -> Path:
        folder = tmp_path / "sweep" / str(number)
        folder.mkdir(parents=True)
        config = {"data": {"name": "tsv", "language": language, "metrics": ["per", "wer"]}, "seed": seed}
        config["model"] = {"attention": attention, "encoder_attention": attention}
        OmegaConf.save(config, folder / "config.yaml")
        overrides = [f"data.language={language}", f"seed={seed}", "threads=1"]
        overrides += [] if attention == "adaptive" else [f"model.attention={attention}"]
        OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")
        wrong = WORDS - right
        results = {"test/wer": 100 * wrong / WORDS, "test/per": 100 * wrong / (4 * WORDS), "seconds": 1.0}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        lines = ["source\tprediction\treference\tdistance\tlength\tgroup"]
        for one in predictions(right, prefix=prefix):
            lines.append(f"{one.source}\t{one.prediction}\t{one.reference}\t{one.distance}\t{one.length}\t")
        (folder / PREDICTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return run


@pytest.fixture
def sweep(run: Callable[..., Path], tmp_path: Path) -> str:
    """A sweep with three seeds of softmax and two of adaptive attention; run 10 comes after run 9."""
    for number, (attention, seed, right) in {
        0: ("softmax", 0, 20),
        1: ("softmax", 1, 22),
        9: ("softmax", 2, 24),
        10: ("adaptive", 0, 38),
        11: ("adaptive", 1, 39),
    }.items():
        run(number, attention, seed, right)
    return str(tmp_path / "sweep")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    run_hydra("compare", compare_module.compare, arguments=list(arguments))
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        printed(capsys, *arguments)
    error = capsys.readouterr().err
    assert error.startswith("sparse-attn compare: ") and error.count("\n") == 1
    return error.removeprefix("sparse-attn compare: ").rstrip()


def test_runs_that_differ_only_in_their_seeds_share_a_line(sweep, capsys):
    lines = [line.split("  ") for line in printed(capsys, f"sweep={sweep}").splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    wer = [100 * (WORDS - right) / WORDS for right in (20, 22, 24)]
    assert rows[0] == ["setting", "runs", "PER %", "WER %"]
    assert rows[1][0:2] == ["model.attention=softmax", "3"]
    assert rows[1][3] == f"{statistics.fmean(wer):.2f} ± {statistics.stdev(wer):.2f}"
    assert rows[2] == ["model.attention=adaptive", "2", "0.94 ± 0.44", "3.75 ± 1.77"]


def test_a_baseline_adds_differences_with_their_interval(sweep, capsys):
    text = printed(capsys, f"sweep={sweep}", "baseline=model.attention=softmax", "metrics=[wer]", "format=csv")
    softmax, adaptive = csv.DictReader(io.StringIO(text))
    assert softmax["wer_diff"] == ""
    assert float(adaptive["wer_diff"]) == pytest.approx(3.75 - 45.0)
    assert -60 < float(adaptive["wer_low"]) < 3.75 - 45.0 < float(adaptive["wer_high"]) < -20
    assert float(adaptive["wer_p"]) < 0.01


def test_each_language_is_compared_with_its_own_baseline(run, tmp_path, capsys):
    for number, (attention, language, right) in enumerate(
        [("softmax", "hun", 10), ("softmax", "jpn", 30), ("topk", "hun", 12), ("topk", "jpn", 32)]
    ):
        run(number, attention, 0, right, language)
    text = printed(capsys, f"sweep={tmp_path / 'sweep'}", "baseline=model.attention=softmax", "format=csv")
    found = {(row["data.language"], row["model.attention"]): row for row in csv.DictReader(io.StringIO(text))}
    assert {key: row["wer_diff"] for key, row in found.items() if key[1] == "topk"} == {
        ("hun", "topk"): "-5.0",
        ("jpn", "topk"): "-5.0",
    }
    assert found["hun", "topk"]["wer_std"] == ""


def test_the_table_in_markdown_and_in_latex(sweep, capsys, tmp_path):
    (tmp_path / "sweep" / "9" / "results.json").unlink()
    arguments = [f"sweep={sweep}", "baseline=model.attention=softmax", "metrics=[wer]"]
    markdown = printed(capsys, *arguments, "format=markdown").splitlines()
    assert markdown[0] == "| setting | runs | WER % | Δ WER % | p |"
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert markdown[3].startswith("| model.attention=adaptive | 2 | 3.75 ± 1.77 | -43.75 [")
    assert markdown[-1] == "1 run without results left out"
    latex = printed(capsys, *arguments, "format=latex").splitlines()
    assert latex[1] == "% 1 run without results left out"
    assert latex[2:6] == [
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"setting & runs & WER \% & $\Delta$ WER \% & p \\",
        r"\midrule",
    ]
    assert latex[7].startswith(r"model.attention=adaptive & 2 & 3.75 $\pm$ 1.77 & -43.75 [")
    assert latex[7].endswith(r" & $<$0.001 \\")


def test_special_characters_of_a_setting_are_escaped_in_latex():
    assert escaped(r"x_{language}.tsv a$b ~^ 5% #&|<> \_") == (
        r"x\_\{language\}.tsv a\$b \textasciitilde{}\textasciicircum{} 5\% \#\&\textbar{}$<$$>$ \textbackslash{}\_"
    )


def test_the_table_can_be_written_to_a_file(sweep, tmp_path, capsys):
    assert printed(capsys, f"sweep={sweep}", "format=csv", f"output={tmp_path / 'table.csv'}") == ""
    assert (tmp_path / "table.csv").read_text().startswith("model.attention,runs,per,")


def test_runs_on_different_words_are_not_compared(run, tmp_path, capsys):
    run(0, "softmax", 0, 10)
    run(1, "topk", 0, 10, prefix="v")
    text = printed(capsys, f"sweep={tmp_path / 'sweep'}", "baseline=model.attention=softmax")
    expected = "model.attention=topk is not compared with the baseline: the runs were tested on different words"
    assert text.splitlines()[-1] == expected


def test_a_run_without_predictions_is_still_in_the_table(sweep, tmp_path, capsys):
    (tmp_path / "sweep" / "10" / PREDICTIONS).unlink()
    text = printed(capsys, f"sweep={sweep}", "baseline=model.attention=softmax")
    assert "3.75 ± 1.77" in text
    assert "is not compared with the baseline: cannot read" in text


def test_the_table_has_the_metrics_that_all_runs_share(run, tmp_path, capsys):
    for number, name in enumerate(("per", "bleu")):
        folder = run(number, "softmax", number, 10)
        (folder / "results.json").write_text(json.dumps({f"test/{name}": 1.0, "test/wer": 75.0}), encoding="utf-8")
    assert printed(capsys, f"sweep={tmp_path / 'sweep'}").split()[:4] == ["setting", "runs", "WER", "%"]
    (tmp_path / "sweep" / "0" / "results.json").write_text('{"test/per": 1.0}', encoding="utf-8")
    assert "the runs must have a metric in common" in refused(capsys, f"sweep={tmp_path / 'sweep'}")


def test_a_metric_of_one_group_is_compared_on_the_words_of_this_group(run, tmp_path, capsys):
    for number, attention, right in ((0, "softmax", 10), (1, "adaptive", 30)):
        folder = run(number, attention, 0, right)
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        # Words 0 to 19 are in group x1, the others in group x2.
        grouped = [lines[0], *(f"{line}x{1 + (index >= 20)}" for index, line in enumerate(lines[1:]))]
        (folder / PREDICTIONS).write_text("\n".join(grouped) + "\n", encoding="utf-8")
        results = {"test/wer": 75.0, "test/wer/x1": 100.0 * max(0, 20 - right) / 20, "test/wer/x2": 0.0}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    given = [f"sweep={tmp_path / 'sweep'}", "metrics=[wer/x1]", "baseline=model.attention=softmax"]
    text = printed(capsys, *given)
    assert "WER % x1" in text and "Δ WER % x1" in text and "50.00" in text and "-50.00 [" in text
    assert "metrics must be in the results of all runs, got 'wer/x9'" in refused(capsys, given[0], "metrics=[wer/x9]")


def test_invalid_input_raises_an_error(sweep, tmp_path, capsys):
    given = f"sweep={sweep}"
    assert refused(capsys, given, "format=html") == "format must be one of text, markdown, latex, csv, got 'html'"
    allowed = "per, wer, accuracy, edit_distance, bleu, chrf"
    assert refused(capsys, given, "metrics=[ter]") == (
        f"metrics must be one of {allowed}, or one of these for a group, such as wer/hun, got 'ter'"
    )
    assert "metrics must be in the results of all runs, got 'bleu'; " in refused(capsys, given, "metrics=[bleu]")
    assert refused(capsys, given, "baseline=model.attention=soft") == (
        "baseline must be of model.attention=softmax|adaptive, got 'model.attention=soft'"
    )
    assert refused(capsys, given, "samples=0") == "samples must be a whole number of at least 1, got 0"
    assert refused(capsys, given, "samples=true") == "samples must be a whole number of at least 1, got True"
    assert "no folder 'nowhere'" in refused(capsys, "sweep=nowhere")
    (tmp_path / "empty").mkdir()
    assert "must hold at least one finished run, got 0 unfinished" in refused(capsys, f"sweep={tmp_path / 'empty'}")
    (tmp_path / "sweep" / "0" / "results.json").write_text("{")
    assert f"{tmp_path / 'sweep' / '0'} must be a run folder, got one that cannot be read" in refused(capsys, given)


@pytest.mark.parametrize(
    "program", [["-m", "recipes.compare"], ["-c", "from recipes.cli import main; main()", "compare"]]
)
def test_folders_can_be_given_without_a_key(sweep, tmp_path, program):
    done = subprocess.run(
        [sys.executable, *program, "sweep/0", "sweep/10", "metrics=[wer]"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["model.attention=softmax", "1"],
        ["model.attention=adaptive", "1"],
    ]


def test_the_bootstrap_agrees_with_the_normal_approximation():
    """One system is wrong on 300 of 1,000 words, the other on 260 of the 300: the error rate falls by 4 points."""
    size, worse, better = 1000, 300, 260
    words = [[Prediction(str(i), "", "", int(i < wrong), 5, "") for i in range(size)] for wrong in (worse, better)]
    base, system = ([statistics_of("wer", table)] for table in words)
    found = paired_bootstrap(base, system, [""] * size, samples=4000)
    error = 100 * np.std([-1.0] * 40 + [0.0] * 960) / np.sqrt(size)
    assert found.mean == pytest.approx(-4.0)
    assert (found.low, found.high) == pytest.approx((-4 - 1.96 * error, -4 + 1.96 * error), abs=0.15)
    assert found.p == 0.0


def test_equal_systems_do_not_differ():
    base = [statistics_of("per", predictions(20))]
    found = paired_bootstrap(base, base, [""] * WORDS, samples=100)
    assert found == (0.0, 0.0, 0.0, 1.0)


def test_all_groups_have_the_same_weight():
    """The mean over two groups with 1 of 2 and 0 of 8 wrong words is 25 %, not 10 %."""
    words = [Prediction(str(i), "", "", int(i == 0), 1, "") for i in range(10)]
    right = [Prediction(str(i), "", "", 0, 1, "") for i in range(10)]
    base, system = ([statistics_of("wer", table)] for table in (right, words))
    assert paired_bootstrap(base, system, ["a"] * 2 + ["b"] * 8, samples=10).mean == 25.0


def test_bleu_from_statistics_equals_bleu_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = [("the cat sat on the mat", "the cat sat on a mat"), ("a dog is there", "a dog was there today")]
    table = [Prediction(str(i), *pair, 1, 1, "") for i, pair in enumerate(texts)]
    values, score = statistics_of("bleu", table)
    expected = sacrebleu.metrics.BLEU().corpus_score([pair[0] for pair in texts], [[pair[1] for pair in texts]]).score
    assert score(values.sum(0)) == pytest.approx(expected)
    assert statistics_of("chrf", table) is None


def test_equal_inputs_of_two_groups_have_the_same_order_in_every_run(tmp_path):
    header = "source\tprediction\treference\tdistance\tlength\tgroup\n"
    found = []
    for closest in ("A", "Z"):  # in the first group, each run has another closest reference
        file = tmp_path / f"{closest}.tsv"
        file.write_text(f"{header}w\tX\t{closest}\t1\t1\tone\nw\tX\tM\t1\t1\ttwo\n", encoding="utf-8")
        found.append([one.group for one in read_predictions(file)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("metrics=[]", "metrics must hold at least one metric, or be null, got []"),
        ("output=none/table", "output must be a file in an existing folder, got 'none/table'"),
    ],
)
def test_an_invalid_value_is_named(sweep, argument, message, capsys):
    with pytest.raises(SystemExit):
        printed(capsys, f"sweep={sweep}", argument)
    assert capsys.readouterr().err == f"sparse-attn compare: {message}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the last columns must be prediction, reference, distance, length, group, got ''"),
        ("source\tprediction\nw\tA\n", "the last columns must be prediction"),
        ("source\tprediction\treference\tdistance\tlength\tgroup\n", "must hold at least one prediction"),
        (
            "source\tprediction\treference\tdistance\tlength\tgroup\nw\tA\tB\tone\t1\t\n",
            "a line must be source<TAB>prediction<TAB>reference<TAB>distance<TAB>length<TAB>group, with whole ",
        ),
    ],
)
def test_damaged_predictions_are_named_in_a_note(sweep, tmp_path, capsys, content, message):
    for file in (tmp_path / "sweep").rglob(PREDICTIONS):
        file.write_text(content, encoding="utf-8")
    out = printed(capsys, f"sweep={sweep}", "baseline=model.attention=softmax")
    assert "is not compared with the baseline" in out and message in out


def test_null_is_the_same_value_from_the_command_line_and_from_the_config(run, tmp_path):
    for number, overrides in enumerate((["seed=0"], ["seed=1", "monitor=null"])):
        folder = run(number, "adaptive", number, 30)
        config = OmegaConf.load(folder / "config.yaml")
        config.monitor = None
        OmegaConf.save(config, folder / "config.yaml")
        OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")
    assert len(group_runs(find_runs([str(tmp_path / "sweep")])[0])) == 1
