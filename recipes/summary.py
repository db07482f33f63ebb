"""The end of a training: what was reached, printed and kept."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from recipes.report import alpha_table, attention_density
from recipes.run import RESULTS, checkpoint_file, read_checkpoint, write_json
from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.scores import Scores, score
from recipes.seq2seq.task import Seq2SeqTask
from sparse_attn import alpha_per_head

EXAMPLES = 10


def conclude(
    folder: Path, task: Seq2SeqTask, data: Seq2SeqData, *, device: torch.device, begin: float
) -> dict[str, float]:
    """Scores the best checkpoint on all validation and test words; prints and writes the results.

    Args:
        folder: The run folder.
        task: The model, whose weights become those of the best checkpoint.
        data: Its data.
        device: Where to compute.
        begin: ``time.monotonic()`` at the start of the run.
    """
    console = Console(highlight=False)
    task.load_state_dict(read_checkpoint(checkpoint_file(folder, "best"))["state_dict"])
    task.to(device)
    with console.status("scoring the best checkpoint on all validation and test words"):
        scores = {"val": score(task, data.full_val_dataloader()), "test": score(task, data.test_dataloader())}
        density = attention_density(task, data.val_dataloader())
    rates = {split: found.metrics() for split, found in scores.items()}
    results = {f"{split}/{name}": value for split, found in rates.items() for name, value in found.items()}
    results["seconds"] = time.monotonic() - begin
    write_json(folder / RESULTS, results)
    console.print()
    console.print(_examples(scores["test"], task))
    console.print()
    console.print(alpha_table(alpha_per_head(task.model), density))
    console.print()
    console.print(_rates(rates, {split: len(found.sources) for split, found in scores.items()}))
    console.print(f"\n{results['seconds']:.0f} s; more: sparse-attn inspect run={folder}", soft_wrap=True)
    return results


def _examples(scores: Scores, task: Seq2SeqTask) -> Table:
    table = Table(title="test words", box=None, padding=(0, 2, 0, 0), title_justify="left")
    for column in ("word", "prediction", "reference"):
        table.add_column(column, justify="left", overflow="fold")
    join = task.target_tokenizer.join
    # The words are in order of length.
    chosen = random.Random(0).sample(range(len(scores.sources)), min(EXAMPLES, len(scores.sources)))
    for index in sorted(chosen):
        prediction, references = scores.predictions[index], scores.references[index]
        wrong = "" if prediction in references else "[red]✗[/red] "
        table.add_row(scores.sources[index], f"{wrong}{join(prediction)}", " | ".join(map(join, references)))
    return table


def _rates(rates: dict[str, dict[str, float]], words: dict[str, int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "PER %", "WER %", "loss", "words"):
        table.add_column(column, justify="right" if column else "left")
    for split, label in (("val", "validation"), ("test", "test")):
        found = rates[split]
        table.add_row(
            label, f"{found['per']:.2f}", f"{found['wer']:.2f}", f"{found['loss']:.3f}", f"{words[split]:,}"
        )
    return table
