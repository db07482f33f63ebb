"""Every experiment is trained from start to end, on a few synthetic lines in the format of its data."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from recipes.launch import config_dir
from recipes.train import train

EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
TINY = [
    "model.dim=8",
    "model.num_heads=2",
    "model.ff_dim=16",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "logger=csv",
]


def words(count: int) -> list[str]:
    rng = random.Random(count)
    return ["".join(rng.choices("abcde", k=rng.randint(2, 6))) for _ in range(count)]


def phones(count: int) -> list[str]:
    return [f"{word}\t{' '.join(word.upper())}" for word in words(count)]


def write(folder: Path, names: Sequence[str], lines: Callable[[int], list[str]]) -> None:
    """Writes the files of the three splits."""
    for name, count in zip(names, (30, 7, 5), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines(count)) + "\n", encoding="utf-8")


def g2p2020(folder: Path, languages: Sequence[str] = ("hun",)) -> None:
    for language in languages:
        write(folder, [f"{split}/{language}_{split}.tsv" for split in ("train", "dev", "test")], phones)


def characters(folder: Path) -> None:
    write(
        folder, ["train.tsv", "val.tsv", "test.tsv"], lambda count: [f"{word}\t{word[::-1]}" for word in words(count)]
    )


def inflection2022(folder: Path) -> None:
    names = ["tur_large.train", "tur.dev", "tur.gold"]
    write(folder, names, lambda count: [f"{word}\t{word}lar\tN;PL" for word in words(count)])


def multi30k(folder: Path) -> None:
    for side, article in (("en", "a"), ("de", "ein")):
        names = [f"{split}.lc.norm.tok.{side}" for split in ("train", "val", "test_2016_flickr")]
        write(folder, names, lambda count, article=article: [f"{article} {word} ." for word in words(count)])


SMALL_SEQUENCES = [f"data.generate.{size}" for size in ("length=3", "factors=[1,2]", "train=40", "val=5", "test=5")]
# For each experiment: a function that writes the data, further arguments, and texts that the output must contain.
DATA: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
    "characters": (characters, [], ["tsv: 30 training", "PER %"]),
    "g2p2020": (g2p2020, ["data.language=hun"], ["g2p2020 hun: 30 training", "PER %"]),
    "g2p2020_multilingual": (
        lambda folder: g2p2020(folder, ["hun", "jpn"]),
        ["model.language_dim=3"],
        ["g2p2020 multilingual: 60 training", "by group", "test WER %", "\njpn "],
    ),
    "g2p2021": (
        lambda folder: write(folder, [f"dut_{split}.tsv" for split in ("train", "dev", "test")], phones),
        [],
        ["g2p2021 dut: 30 training"],
    ),
    "inflection2022": (inflection2022, ["data.language=tur"], ["inflection2022 tur: 30 training", "accuracy %"]),
    "length": (None, [*SMALL_SEQUENCES, "data.output_length=9"], ["copy: 40 training", "by group", "\nx2 "]),
    "multi30k": (multi30k, ["data.bpe_size=60"], ["multi30k en-de: 30 training", "BLEU", "tok:none"]),
}


def test_every_experiment_has_a_test():
    assert set(EXPERIMENTS) == set(DATA)


def test_the_readme_has_a_valid_command_for_every_experiment():
    page = (config_dir().parent / "recipes/seq2seq/README.md").read_text(encoding="utf-8")
    first, *sections = re.findall(r"^## (\w+)\n\n    sparse-attn train *(.*)$", page, re.MULTILINE)
    assert first == ("default", "")
    assert sorted(name for name, _ in sections) == EXPERIMENTS
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for name, arguments in sections:
            assert f"experiment={name}" in arguments.split()
            compose("train", [re.sub(",.*", "", argument) for argument in arguments.removeprefix("-m ").split()])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_and_prints_its_scores(experiment, tmp_path, capsys):
    write_data, arguments, expected = DATA[experiment]
    if experiment == "multi30k":
        pytest.importorskip("sacrebleu")
    if write_data is not None:
        write_data(tmp_path / "data")
        arguments = [f"data.path={tmp_path / 'data'}", *arguments]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", *TINY, f"paths.output_dir={tmp_path / 'run'}", *arguments])
    results = train(cfg)
    out = capsys.readouterr().out
    for text in expected:
        assert text in out
    first = cfg.data.metrics[0]
    assert f"test/{first}" in results
    assert max(map(len, out.splitlines())) <= 120
