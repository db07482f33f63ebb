"""A run folder made without a training; command line and configuration of a quick training; coarse pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from recipes.arguments import quoted
from recipes.launch import config_dir
from recipes.seq2seq.task import Seq2SeqTask
from recipes.seq2seq.tokenizer import Tokenizer
from sparse_attn import alpha_per_head

WORDS = ("abba", "cab", "bac", "acacia", "baobab", "dada")
LAYERS, HEADS = 2, 3


def pairs(words: tuple[str, ...]) -> str:
    return "".join(f"{word}\t{' '.join(letter.upper() for letter in word)}\n" for word in words)


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures with fewer pixels, which are drawn faster."""
    monkeypatch.setattr("recipes.report.plots.DPI", 50)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with adaptive encoder, softmax decoder and top-k cross-attention; its data have six training words."""
    folder = tmp_path / "finished"
    (folder / "checkpoints").mkdir(parents=True)
    for split, words in {"train": WORDS, "val": WORDS[:5], "test": WORDS[2:]}.items():
        (tmp_path / f"{split}.tsv").write_text(pairs(words), encoding="utf-8")
    source = Tokenizer.fit(WORDS, split="characters", normalization="NFC")
    target = Tokenizer.fit([word.upper() for word in WORDS], split="characters", normalization="NFC")
    target = Tokenizer(target.symbols, split="spaces", normalization="NFC")
    kinds = {
        "encoder_attention": "adaptive",
        "decoder_attention": "softmax",
        "cross_attention": "topk",
        "k": 2,
    }
    torch.manual_seed(1)
    task = Seq2SeqTask(
        source_tokenizer=source.state(),
        target_tokenizer=target.state(),
        model={
            "dim": 12,
            "num_heads": HEADS,
            "ff_dim": 16,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            **kinds,
        },
        max_length=7,
    )
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if "alpha" not in name:
                parameter.mul_(2)  # so that attention is not nearly uniform
    state = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(state)
    torch.save(state, folder / "checkpoints/best.ckpt")
    training = {"epoch": 0, "global_step": 9, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    torch.save({**state, **training, "callbacks": {"BestAndLast": {}}}, folder / "checkpoints/last.ckpt")
    data = {
        "name": "tsv",
        "path": str(tmp_path),
        **{split: str(tmp_path / f"{split}.tsv") for split in ("train", "val", "test")},
        "batch_size": 2,
        "eval_batch_size": 2,
        "seed": 0,
        "source_split": "characters",
        "target_split": "spaces",
        "normalization": "NFC",
        "limit": None,
        "eval_limit": 2,
    }
    OmegaConf.save({"data": data, "model": kinds}, folder / "config.yaml")
    rates = {"per": 12.5, "wer": 30.25, "loss": 0.5}
    results = {f"{split}/{name}": rate for split in ("val", "test") for name, rate in rates.items()} | {"seconds": 3.2}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    alphas = {layer: alpha.tolist() for layer, alpha in alpha_per_head(task.model).items()}
    rows = [
        f"{step},{layer},{head},{alpha + 0.01 * step:.6f}\n"
        for step in (0, 5, 9)
        for layer, values in alphas.items()
        for head, alpha in enumerate(values)
    ]
    (folder / "alpha.csv").write_text("step,layer,head,alpha\n" + "".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a quick training: 40 generated words, 2 epochs of 5 steps."""

    def arguments(*more: str) -> list[str]:
        letters = random.Random(0)
        for split, count in {"train": 40, "val": 7, "test": 11}.items():
            words = tuple("".join(letters.choices("abcde", k=letters.randint(2, 7))) for _ in range(count))
            (tmp_path / f"{split}.tsv").write_text(pairs(words), encoding="utf-8")
        model = {"dim": 8, "num_heads": 2, "ff_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
        trainer = {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1}
        return [
            "data=tsv",
            f"data.path={quoted(str(tmp_path))}",
            "data.batch_size=8",
            "optimizer.warmup_steps=3",
            "logger=csv",
            f"paths.output_dir={quoted(str(tmp_path / 'run'))}",
            *(f"model.{key}={value}" for key, value in model.items()),
            *(f"trainer.{key}={value}" for key, value in trainer.items()),
            *more,
        ]

    return arguments


@pytest.fixture
def tiny_config(tiny_arguments: Callable[..., list[str]]) -> Callable[..., DictConfig]:
    """The configuration of the training of ``tiny_arguments``."""

    def config(*more: str) -> DictConfig:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("train", tiny_arguments(*more))

    return config
