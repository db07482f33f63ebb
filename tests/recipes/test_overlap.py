"""Accuracy by what the training data contain, in the report of evaluate and in its JSON file."""

import json
from pathlib import Path

from recipes.evaluate import evaluate, training_sources
from recipes.launch import run_hydra
from recipes.report.overlap import Part, overlap
from recipes.run import load_run
from recipes.seq2seq.scores import Scores
from recipes.train import train


def test_sources_and_features_are_known_only_in_the_same_language():
    fields = ["language", "source", "features"]
    training = ["hun\tab\tV;PST", "hun\tcd\tN", "kat\tef\tN"]
    expected = {
        "hun\tab\tV;PST": "known_both",
        "hun\tab\tN": "known_both",  # source and features are known, from two different inputs
        "hun\tab\tV": "known_source",
        "hun\tx\tN": "known_features",
        "kat\tab\tN": "known_features",
        "kat\tab\tV;PST": "known_neither",
    }
    for source, part in expected.items():
        right = Scores(sources=[source], predictions=[["a"]], references=[[["b"], ["a"]]])
        wrong = Scores(sources=[source], predictions=[["a"]], references=[[["b"]]])
        assert overlap(right, fields, training) == {part: Part(1, 100.0)}
        assert overlap(wrong, fields, training) == {part: Part(1, 0.0)}


def test_evaluate_prints_and_writes_the_accuracy_of_the_parts(tiny_config, tmp_path, capsys):
    files = {
        "train": "ab\tA\tV\ncd\tB\tN\nef\tA\tV\n",
        "val": "ab\tA\tN\n",
        "test": "ab\tA\tV\ncd\tA\tX\ncd\tA\tY\ngh\tB\tN\nij\tB\tX;Y\n",
    }
    config = tiny_config("data.columns=[source,target,features]", "trainer.max_epochs=1")
    for split, text in files.items():
        (tmp_path / f"{split}.tsv").write_text(text, encoding="utf-8")
    train(config)
    run = tmp_path / "run"
    capsys.readouterr()

    def written() -> dict[str, float]:
        run_hydra("evaluate", evaluate, arguments=[f"run={run}", "split=test"])
        return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))

    found = written()
    parts = {"both": 1, "source": 2, "features": 1, "neither": 1}
    assert {part: found[f"test/known_{part}/words"] for part in parts} == parts
    right = sum(found[f"test/known_{part}/accuracy"] * words for part, words in parts.items())
    assert right / sum(parts.values()) == found["test/accuracy"]
    out = capsys.readouterr().out
    assert "accuracy by what the training data contain" in out and "only the source known" in out
    limited = load_run(run)
    limited.config.data.limit = 1
    assert len(training_sources(limited)) == 1, "only the words that were used in training count as known"
    Path(tmp_path / "train.tsv").unlink()
    assert not [key for key in written() if "known" in key], "without the training file there are no parts"


def test_data_without_features_have_no_parts(run_folder):
    assert training_sources(load_run(run_folder)) == []
