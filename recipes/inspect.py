"""Look into a trained model: ``sparse-attn inspect run=DIR`` or ``python -m recipes.inspect``."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from sparse_attn import alpha_per_head

from .evaluate import data_section, evaluation_data, given_data
from .launch import run_hydra
from .report import alpha_table, attention_density, measure_heads, roles_table, top_k_per_layer
from .report.maps import choose_word, word_maps
from .report.tables import ROLES_EXPLAINED
from .report.write import Report, write_report
from .run import load_run, short_path


def inspect(cfg: DictConfig) -> dict[str, list[float]]:
    """Prints α, attention density and role of every head, and writes plots and a page into the run folder.

    Args:
        cfg: ``configs/inspect.yaml`` as composed by Hydra.

    Returns:
        Layer name -> density of each head on the validation words.

    Raises:
        FileNotFoundError: If a run, its checkpoint or a data file is missing.
        ValueError: If the data or a checkpoint cannot be read, or the two runs differ in layers or heads.
    """
    run = load_run(cfg.run, cfg.checkpoint)
    other = load_run(cfg.compare, cfg.checkpoint) if cfg.compare is not None else None
    section = data_section(run, given_data(cfg), ("val",))
    data = evaluation_data(section, run.task)
    console = Console(highlight=False)
    compared = {}
    with console.status("measuring attention on the validation words"):
        heads = measure_heads(run.task, data.full_val_dataloader())
        if other is not None:
            # The same words, read with the vocabulary of the other run.
            words = evaluation_data(section, other.task).full_val_dataloader()
            compared[other.folder.name] = attention_density(other.task, words)
    density = {layer: measured.density for layer, measured in heads.items()}
    alpha, top_k = alpha_per_head(run.task.model), top_k_per_layer(run.task.model)
    word = choose_word(example.source for example in data.splits.val) if cfg.word is None else str(cfg.word)
    report = Report(
        run=run,
        heads=heads,
        alpha=alpha,
        top_k=top_k,
        words=len(data.splits.val),
        sample=word_maps(run.task, word),
        compared=compared,
    )
    console.print(alpha_table(alpha, density, top_k=top_k, compared=compared))
    console.print()
    console.print(roles_table(heads))
    console.print(ROLES_EXPLAINED, style="dim")
    console.print(f"\nmeasured on {report.words:,} validation words; written:")
    for file in write_report(report):
        console.print(f"  {short_path(file)}", markup=False, soft_wrap=True)
    return {layer: values.tolist() for layer, values in density.items()}


def main() -> None:
    """Runs ``sparse-attn inspect``."""
    run_hydra("inspect", inspect)


if __name__ == "__main__":
    main()
