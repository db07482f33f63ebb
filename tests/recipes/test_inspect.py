import csv
import html
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from recipes.inspect import inspect
from recipes.launch import run_hydra
from recipes.report.words import read_batch
from recipes.report.worth import measure_worth
from recipes.report.write import read_course
from recipes.run import load_run
from sparse_attn import alpha_per_head

pytestmark = pytest.mark.usefixtures("coarse_pictures")

KINDS = (
    "encoder.layers.{}.self_attn",
    "decoder.layers.{}.self_attn",
    "decoder.layers.{}.multihead_attn",
)
LAYERS = [name.format(layer) for name in KINDS for layer in range(2)]
FILES = ["alpha.png", "alpha_course.png", "attention.png", "heads.csv", "numbers.json", "report.html", "rollout.png"]


def page_of(run: Path) -> str:
    return html.unescape((run / "report" / "report.html").read_text(encoding="ascii"))


def run_inspect(*arguments: str) -> None:
    run_hydra("inspect", inspect, arguments=arguments)


def lines_after(out: str, start: str, count: int) -> list[list[str]]:
    lines = out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(start))
    return [line.split() for line in lines[first : first + count]]


def test_inspect_prints_tables_and_writes_files(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_inspect(f"run={run_folder}")
    out = capsys.readouterr().out
    assert max(map(len, (line for line in out.splitlines() if str(run_folder) not in line))) <= 80
    alpha = alpha_per_head(load_run(run_folder).task.model)[LAYERS[0]]
    assert lines_after(out, LAYERS[0], 1) == [[LAYERS[0], *(f"{value:.2f}" for value in alpha.tolist())]]
    # Kinds without a learnt α: softmax has α = 1 and is dense; for top-k, k is shown.
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
    # The data of the other run are not needed.
    config = other / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("val.tsv", "gone.tsv"), encoding="utf-8")
    run_inspect(f"run={run_folder}", f"compare={other}")
    out = capsys.readouterr().out
    for layer in LAYERS:
        _, ours, theirs = lines_after(out, layer, 3)
        assert theirs == ["other", *ours[1:]]
    assert "density, other" in page_of(run_folder)
    assert not (other / "report").exists()


def test_the_word_to_draw_can_be_chosen(run_folder: Path) -> None:
    run_inspect(f"run={run_folder}", "word=cabbac")
    page = page_of(run_folder)
    assert "Attention for one word: cabbac →" in page
    run_inspect(f"run={run_folder}")
    assert "Attention for one word: acacia →" in page_of(run_folder)


def test_training_words_test_words_curves_and_results_are_not_needed(run_folder: Path) -> None:
    for split in ("train", "test"):
        (run_folder.parent / f"{split}.tsv").unlink()
    (run_folder / "alpha.csv").unlink()
    (run_folder / "results.json").unlink()  # an interrupted training has none
    run_inspect(f"run={run_folder}")
    report = run_folder / "report"
    assert sorted(path.name for path in report.iterdir()) == [name for name in FILES if name != "alpha_course.png"]
    page = page_of(run_folder)
    assert "This run recorded no α." in page and "None: the training was stopped before its end." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "no run folder 'nowhere'"),
        (["compare=nowhere"], "no run folder 'nowhere'"),
        (["word=''"], "word must hold at least one character, got ''"),
        (["words=[]"], "words must hold at least one word, none of them empty, got []"),
        (["words=[cab,'']"], "words must hold at least one word, none of them empty, got ['cab', '']"),
        (["words=[cab]", "word=bac"], "only one of words, word and input can be given, got words and word"),
        (["input=nowhere"], "cannot read the input file 'nowhere'"),
        (["figures=gif"], "figures must be one of png, svg, pdf, got 'gif'"),
        (["align.heads=few"], "align.heads must be one of any, most, all, best, got 'few'"),
        (["align.layer=2"], "align.layer must be all or a number from -2 to 1, got 2"),
        (["worth_words=0"], "worth_words must be a whole number of at least 1, got 0"),
        (["alignments=nowhere/file"], "alignments must be a file in an existing folder, got 'nowhere/file'"),
        (["alignments=."], "alignments must be a file, got the folder '.'"),
        (["output=pyproject.toml/report"], "output must be a folder, got 'pyproject.toml/report', where "),
        (["worth=no"], "worth must be true or false, got 'no'"),
        (["baselines=0"], "baselines must be true or false, got 0"),
        (["text=cab"], "text is for model=DIR, got text=cab with run="),
        (["attention=softmax"], "attention is for model=DIR, got attention=softmax with run="),
        (
            ["+data.test=x.tsv", "data.val=null"],
            "no val file: the run was trained on tsv, got data.test; give data.val=FILE",
        ),
        (["model=nowhere"], "only one of run and model can be given"),
        (["run=null"], "run has no value; give it as run=DIR"),
        (["wrds=cab"], "unknown key 'wrds', did you mean 'words'?"),
    ],
)
def test_invalid_input_gives_a_one_line_error(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = arguments if arguments[0] in ("run=nowhere", "run=null") else [f"run={run_folder}", *arguments]
    with pytest.raises(SystemExit) as stopped:
        run_inspect(*given)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sparse-attn inspect: {message}") and err.count("\n") == 1
    assert "split=" not in err and (arguments != ["attention=softmax"] or "words=" not in err)
    assert not (run_folder / "report").exists(), "the error comes before the work"


def test_damaged_rows_of_alpha_csv_are_left_out(run_folder: Path) -> None:
    file = run_folder / "alpha.csv"
    whole = read_course(file)
    file.write_bytes(
        file.read_bytes()
        + b"10,encoder.layers.0.self_attn,0,nan\n10,a\n\xff\xfe,a,0,1.5\n11,encoder.layers.0.self_attn,0,1."
    )
    assert read_course(file) == whole
    run_inspect(f"run={run_folder}")
    assert (run_folder / "report/alpha_course.png").exists()


def test_a_run_is_compared_with_a_run_of_the_same_name(run_folder: Path) -> None:
    # The runs of every sweep are called 0, 1, 2, ...
    folders = [run_folder.parent / sweep / "0" for sweep in ("ours", "theirs")]
    for folder in folders:
        shutil.copytree(run_folder, folder)
    course = (run_folder / "alpha.csv").read_text(encoding="utf-8")
    (folders[1] / "alpha.csv").write_text(course.replace(",1.5", ",1.7"), encoding="utf-8")
    run_inspect(f"run={folders[0]}", f"compare={folders[1]}", "baselines=false")
    page = (folders[0] / "report" / "report.html").read_text(encoding="ascii")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    first = {run: data["courses"][run][LAYERS[0]]["0"][0][1] for run in data["runs"]}
    assert first == {"ours/0": pytest.approx(1.5, abs=0.05), "theirs/0": pytest.approx(1.7, abs=0.05)}


def test_the_course_of_a_compared_run_is_not_drawn_for_the_inspected_run(run_folder: Path) -> None:
    other = run_folder.parent / "other"
    shutil.copytree(run_folder, other)
    (run_folder / "alpha.csv").unlink()
    run_inspect(f"run={run_folder}", f"compare={other}", "baselines=false")
    assert not (run_folder / "report/alpha_course.png").exists()
    assert "This run recorded no α." in page_of(run_folder)


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        ('{"val/per": 3', "results.json cannot be read"),
        ("[]", "results.json cannot be read"),
        ('{"val/per": 3}', "3.00"),
    ],
)
def test_a_report_is_written_despite_damaged_records(run_folder: Path, results: str, shown: str) -> None:
    (run_folder / "alpha.csv").write_text("foo,bar\n1,2\n", encoding="utf-8")
    (run_folder / "results.json").write_text(results, encoding="utf-8")
    run_inspect(f"run={run_folder}", "baselines=false")
    assert shown in page_of(run_folder)


def numbers_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "numbers.json").read_text(encoding="utf-8"))


def test_the_words_to_show_can_be_chosen(run_folder: Path, tmp_path: Path) -> None:
    run_inspect(f"run={run_folder}", "words=[cab,bacca]")
    assert [entry["word"] for entry in numbers_of(run_folder)["words"]] == ["cab", "bacca"]
    task = load_run(run_folder).task
    outputs = [task.target_tokenizer.join(tokens) for tokens in task.predict_words(["cab", "bacca"])]
    assert [entry["output"] for entry in numbers_of(run_folder)["words"]] == outputs
    file = tmp_path / "words.txt"
    file.write_text("dada\n\nabba\n", encoding="utf-8")
    run_inspect(f"run={run_folder}", f"input={file}")
    assert [entry["word"] for entry in numbers_of(run_folder)["words"]] == ["dada", "abba"]


def test_words_are_taken_literally(run_folder: Path) -> None:
    run_inspect(f"run={run_folder}", "words=[true, null ,1e3,'a,b']", "baselines=false")
    assert [entry["word"] for entry in numbers_of(run_folder)["words"]] == ["true", "null", "1e3", "a,b"]
    run_inspect(f"run={run_folder}", "words=12", "baselines=false")
    assert [entry["word"] for entry in numbers_of(run_folder)["words"]] == ["12"]


def test_the_page_contains_the_data_of_the_interactive_view(run_folder: Path) -> None:
    run_inspect(f"run={run_folder}", "words=[cab,bacca]")
    page = (run_folder / "report" / "report.html").read_text(encoding="ascii")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["labels"] == ["cab", "bacca"] and [layer["name"] for layer in data["layers"]] == LAYERS
    with (run_folder / "report" / "heads.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    density = [value for layer in data["layers"] for value in layer["numbers"]["density"]]
    assert density == pytest.approx([float(row["density"]) for row in rows], abs=5.1e-5)
    cross = data["layers"][-1]["maps"][1]
    texts = [data["texts"][cross[side]]["tokens"] for side in ("queries", "keys")]
    assert texts[1] == [*"bacca", "<eos>"] and texts[0][-1] == "<eos>"
    assert list(data["courses"]) == ["finished"]


def test_alignments_are_the_pairs_to_which_heads_give_weight(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("dada\n\nabba\n", encoding="utf-8")
    out = tmp_path / "pairs.txt"
    found = {}
    for rule in ("any", "most", "all", "best"):
        run_inspect(f"run={run_folder}", f"input={file}", f"alignments={out}", f"align.heads={rule}", "baselines=false")
        found[rule] = out.read_text(encoding="utf-8").splitlines()
    read = read_batch(load_run(run_folder).task, ["dada", "abba"])
    weights = read.record[LAYERS[-1]].weights
    assert weights is not None
    for index, line in {0: 0, 1: 2}.items():
        counts = (weights[index, :, : len(read.written[index]) - 1, :4] != 0).sum(0)
        for rule, least in {"any": 1, "most": 2, "all": 3}.items():
            expected = {f"{key}-{query}" for query, key in (counts >= least).nonzero().tolist()}
            assert set(found[rule][line].split()) == expected
        assert len(found["best"][line].split()) == len(read.written[index]) - 1
    assert all(lines[1] == "" and len(lines) == 3 for lines in found.values())


def test_the_effect_of_each_head_on_the_loss_is_reported(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_inspect(f"run={run_folder}", "worth=true", "worth_words=3")
    out = capsys.readouterr().out
    # The model is measured unchanged, with each of 18 heads switched off, and with each of the 6 heads with a learnt α
    # made dense and made sparser: 1 + 18 + 2 · 6 = 31.
    assert "change of the loss for each head: 31 times 3 words, about" in out and "made dense" in out
    heads = numbers_of(run_folder)["heads"]
    assert all(isinstance(head["loss when switched off"], float) for head in heads)
    assert [head["loss when made dense (α = 1)"] is None for head in heads] == [False] * 6 + [True] * 12
    assert "Effect of each head on the loss" in page_of(run_folder)


def test_the_effect_is_measured_on_words_of_all_lengths(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []

    def recorded(task: Any, batches: Iterable[dict[str, Any]], console: Console) -> Any:
        kept = list(batches)
        words.extend(word for batch in kept for word in batch["sources"])
        return measure_worth(task, kept, console)

    monkeypatch.setattr("recipes.inspect.measure_worth", recorded)
    # Every word is longer than the limit, so that each is a batch of its own. The batches are in order of length.
    config = OmegaConf.load(run_folder / "config.yaml")
    config.data.eval_batch_tokens = 3
    OmegaConf.save(config, run_folder / "config.yaml")
    run_inspect(f"run={run_folder}", "worth=true", "worth_words=3", "baselines=false")
    assert len(set(words)) == len(words) == 3
    assert max(map(len, words)) == 6  # the three shortest of the five words have up to four letters


def test_other_alphas_are_measured_unless_switched_off(run_folder: Path) -> None:
    run_inspect(f"run={run_folder}")
    numbers = numbers_of(run_folder)
    assert [head["density at α = 1"] for head in numbers["heads"][:6]] == [1.0] * 6
    assert set(numbers["diversity"]) == {"learnt", "α = 1.5", "α = 1"}
    assert all(0 <= value <= math.log(3) for by_layer in numbers["diversity"].values() for value in by_layer.values())
    assert "with one α in all heads that learn α" in page_of(run_folder)
    run_inspect(f"run={run_folder}", "baselines=false")
    assert set(numbers_of(run_folder)["diversity"]) == {"learnt"}
    without = page_of(run_folder)
    assert "Jensen-Shannon divergence" in without and "For comparison, the same model" not in without


def test_format_and_folder_of_the_pictures_can_be_chosen(run_folder: Path, tmp_path: Path) -> None:
    run_inspect(f"run={run_folder}", "figures=svg", f"output={tmp_path / 'out' / 'here'}")
    written = sorted(path.name for path in (tmp_path / "out" / "here").iterdir())
    assert written == sorted(name.replace(".png", ".svg") for name in FILES)
    assert not (run_folder / "report").exists()
