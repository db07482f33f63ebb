"""Messages at the start and the end of a training, its results, and the table of a sweep."""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_attn import alpha_per_head

from .predictions import PREDICTIONS, write_predictions
from .report import alpha_table, attention_density, top_k_per_layer
from .report.scores import print_scores
from .run import CHECKPOINTS, RESULTS, checkpoint_file, read_checkpoint, short_path, write_json
from .seq2seq.data import Seq2SeqData
from .seq2seq.decode import Decoding
from .seq2seq.metrics import METRICS
from .seq2seq.scores import Scores, score
from .seq2seq.task import Seq2SeqTask

EXAMPLES = 10
LONGEST_EXAMPLE = 48


def headline(folder: Path, data: Seq2SeqData, task: Seq2SeqTask, trainer: L.Trainer, step: int) -> str:
    """The first two lines of a training.

    The first line describes the data. The second line has the number of parameters, the device, the last finished step
    if a run is continued, and the run folder.
    """
    splits = data.splits
    words = f"{len(splits.train):,} training, {len(splits.val):,} validation and {len(splits.test):,} test words"
    weights = sum(parameter.numel() for parameter in task.parameters())
    device = trainer.strategy.root_device.type
    start = f", continuing after step {step}" if step else ""
    return f"{data.title}: {words}\n{weights:,} parameters on {device}{start}; run folder {short_path(folder)}"


def early_stop(trainer: L.Trainer) -> str | None:
    """A message on why an ``EarlyStopping`` callback ended a training early; None if no callback did."""
    if not trainer.should_stop:  # a resumed callback still has the reason of its earlier stop
        return None
    for callback in trainer.early_stopping_callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            # Patience counts validations, which may be fewer or more than the epochs.
            waited = f"{callback.patience} validation{'s' * (callback.patience != 1)}"
            goal, limit = callback.stopping_threshold, callback.divergence_threshold
            reason = {
                EarlyStoppingReason.PATIENCE_EXHAUSTED: f"has not improved for {waited}",
                EarlyStoppingReason.STOPPING_THRESHOLD: f"has reached the stopping_threshold of {goal}",
                EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"has passed the divergence_threshold of {limit}",
                EarlyStoppingReason.NON_FINITE_METRIC: "is not a finite number",
            }[callback.stopping_reason]
            return f"stopped early after epoch {callback.stopped_epoch + 1}: {callback.monitor} {reason}"
    return None


def farewell(folder: Path) -> str:
    """The message of an interrupted training: what has been saved, and how to continue."""
    if (folder / CHECKPOINTS / "last.ckpt").exists():
        command = f"sparse-attn train resume={shlex.quote(short_path(folder))}"
        return f"stopped; the checkpoint of the last finished epoch is kept, to continue: {command}"
    return (
        f"stopped before the end of the first epoch: {short_path(folder)} has no checkpoint to continue from; "
        "to train from the start, run the same command again"
    )


def conclude(
    folder: Path, task: Seq2SeqTask, data: Seq2SeqData, decoding: Decoding, *, device: torch.device, begin: float
) -> dict[str, float]:
    """Scores the best checkpoint on all validation and test words; prints and writes the results.

    Args:
        folder: The run folder.
        task: The model, whose weights become those of the best checkpoint.
        data: The data.
        decoding: The decoding of the words.
        device: The device on which the model runs.
        begin: ``time.monotonic()`` at the start of this session, minus the duration of earlier sessions of the run.
    """
    console = Console(highlight=False)
    task.load_state_dict(read_checkpoint(checkpoint_file(folder, "best"))["state_dict"])
    task.to(device)
    with console.status("scoring the best checkpoint on all validation and test words"):
        loaders = {"val": data.full_val_dataloader(), "test": data.test_dataloader()}
        decode = partial(decoding.best, task.model, max_length=task.hparams["max_length"])
        scores = {split: score(task, loader, decode) for split, loader in loaders.items()}
        density = attention_density(task, data.full_val_dataloader())
    results = {f"{split}/{name}": value for split, found in scores.items() for name, value in found.metrics().items()}
    results["seconds"] = time.monotonic() - begin
    write_predictions(folder / PREDICTIONS, scores["test"], task.source_tokenizer.fields)
    write_json(folder / RESULTS, {**results, **_signatures(scores["test"])})
    console.print()
    console.print(_examples(scores["test"], task))
    console.print()
    console.print(alpha_table(alpha_per_head(task.model), density, top_k=top_k_per_layer(task.model)))
    console.print()
    print_scores(console, scores)
    place = shlex.quote(short_path(folder))
    console.print(Text(f"\n{results['seconds']:.0f} s; inspect it: sparse-attn inspect run={place}"), soft_wrap=True)
    return results


def print_comparison(runs: Sequence[tuple[Sequence[str], Mapping[str, float] | str]]) -> None:
    """Prints one row per run.

    Args:
        runs: The overrides of each run, with its results, or a text that says why there are no results.
    """
    if not runs:
        return
    common = set.intersection(*(set(changes) for changes, _ in runs))
    finished = [results for _, results in runs if not isinstance(results, str)]
    shown = [name for name in METRICS if any(f"test/{name}" in results for results in finished)][:2]
    labels = {f"{split}/{name}": METRICS[name].label.removesuffix(" %") for split in ("val", "test") for name in shown}
    columns = {f"{key.partition('/')[0]} {label}": key for key, label in labels.items()}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run")
    for column in (*columns, "seconds"):
        table.add_column(column, justify="right")
    if len(finished) < len(runs):
        table.add_column("failed because")
    for changes, results in runs:
        name = Text(" ".join(change for change in changes if change not in common) or "-")
        if isinstance(results, str):
            table.add_row(name, *["-"] * (len(columns) + 1), Text(results))
        else:
            rates = (f"{results[key]:.2f}" if key in results else "-" for key in columns.values())
            table.add_row(name, *rates, f"{results['seconds']:.0f}")
    # The table may be wider than the terminal, so that long overrides are not cut.
    needed = Console(width=1000).measure(table).maximum
    console = Console(highlight=False, width=max(Console().width, needed))
    console.print()
    console.print(table)


def _signatures(scores: Scores) -> dict[str, dict[str, str]]:
    """The signatures of BLEU and chrF, if they were computed."""
    return {"signatures": scores.signatures} if scores.signatures else {}


def _short(text: str) -> str:
    """The text, or only its beginning if it is long: ten whole sentences would fill several screens."""
    return text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 1] + "…"


def _examples(scores: Scores, task: Seq2SeqTask) -> Table:
    table = Table(title="test words", box=None, padding=(0, 2, 0, 0), title_justify="left")
    for column in ("word", "prediction", "reference"):
        table.add_column(column, justify="left", overflow="fold")
    join = task.target_tokenizer.join
    # A random choice: the words are sorted by length, so the first words are all short.
    chosen = random.Random(0).sample(range(len(scores.sources)), min(EXAMPLES, len(scores.sources)))
    for index in sorted(chosen):
        prediction, references = scores.predictions[index], scores.references[index]
        wrong = "" if prediction in references else "✗ "
        # rich.Text instead of str, so that square brackets and colons in the data are not read as markup.
        shown = Text.assemble((wrong, "red"), _short(join(prediction)))
        source = _short(scores.sources[index].replace("\t", " "))
        table.add_row(Text(source), shown, Text(_short(" | ".join(map(join, references)))))
    return table
