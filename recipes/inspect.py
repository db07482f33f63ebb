"""Report on the heads of a trained model: ``sparse-attn inspect run=DIR`` or ``python -m recipes.inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sparse_attn import alpha_per_head

from .evaluate import data_section, evaluation_data, given_data
from .folders import check_output, check_output_folder
from .launch import run_hydra
from .report import alpha_table, attention_density, measure_at, measure_heads, roles_table, top_k_per_layer
from .report.alignments import RULES, alignment_lines, check_alignment, write_lines
from .report.maps import choose_word, word_maps
from .report.measure import layer_kind
from .report.tables import ROLES_EXPLAINED
from .report.words import LONGEST_SHOWN, given_words, read_batch
from .report.worth import measure_worth, worth_table
from .report.write import ENTMAX15, FIGURES, FOLDER, SOFTMAX, Report, read_course, write_report
from .run import ALPHA, load_run, short_path

# The largest number of words on the page, since a longer page opens slowly. Alignments are written for all words.
MOST_SHOWN = 64
SHOWN_BY_DEFAULT = 6


def inspect(cfg: DictConfig) -> dict[str, list[float]]:
    """Prints α, attention density and role of every head, and writes pictures, numbers and a page.

    Args:
        cfg: ``configs/inspect.yaml``, composed by Hydra.

    Returns:
        Layer name -> density of each head on the validation words, or on the text.

    Raises:
        FileNotFoundError: If a run, its checkpoint or a data file is missing.
        TypeError: If a setting has the wrong type.
        ValueError: If a value is not allowed, the data or a checkpoint cannot be read, or the two runs differ in
            layers or heads.
    """
    if cfg.figures not in FIGURES:
        raise ValueError(f"figures must be one of {', '.join(FIGURES)}, got {cfg.figures!r}")
    for name in ("worth", "baselines"):
        if not isinstance(cfg[name], bool):
            raise TypeError(f"{name} must be true or false, got {cfg[name]!r}")
    if cfg.run is None and cfg.hf_model is None:
        raise ValueError(
            "run has no value; give it as run=DIR, the run folder of a training, or give model=DIR, the folder of a "
            "Hugging Face model"
        )
    if cfg.run is not None and cfg.hf_model is not None:
        raise ValueError(f"only one of run and model can be given, got run={cfg.run} and model={cfg.hf_model}")
    for name, check in {"output": check_output_folder, "alignments": check_output}.items():
        if cfg[name] is not None:
            check(name, str(cfg[name]))
    if cfg.hf_model is not None:
        from .report.huggingface import inspect_model

        return inspect_model(cfg)
    return _inspect_run(cfg)


def _inspect_run(cfg: DictConfig) -> dict[str, list[float]]:
    instead = {
        "text": "the words of a run are given as words=[...] or input=FILE",
        "target": "a run generates the output of its words itself",
        "attention": "a run keeps the attention that it was trained with",
    }
    for name, reason in instead.items():
        if cfg[name] is not None:
            raise ValueError(f"{name} is for model=DIR, got {name}={cfg[name]} with run={cfg.run}; {reason}")
    run = load_run(cfg.run, cfg.checkpoint)
    task = run.task
    other = load_run(cfg.compare, cfg.checkpoint) if cfg.compare is not None else None
    fields = task.source_tokenizer.fields
    if other is not None and (found := other.task.source_tokenizer.fields) != fields:
        raise ValueError(
            f"compare must be a run whose inputs have the fields {', '.join(fields)}, got {other.folder} with "
            f"{', '.join(found)}"
        )
    given = given_words(_plain(cfg.words), cfg.word, cfg.input, fields)
    crossing = sum(layer_kind(name) == "cross" for name, _ in task.model.named_modules() if name.endswith("_attn"))
    check_alignment(cfg.align.heads, cfg.align.layer, crossing)
    if type(cfg.worth_words) is not int or cfg.worth_words < 1:
        raise ValueError(f"worth_words must be a whole number of at least 1, got {cfg.worth_words!r}")
    section = data_section(run, given_data(cfg), ("val",))
    data = evaluation_data(section, task)
    console = Console(highlight=False)
    ours, theirs = _names(run.folder, run.folder if other is None else other.folder)
    compared, courses = {}, {ours: read_course(run.folder / ALPHA)}
    baselines = {}
    with console.status("measuring attention on the validation words"):
        heads = measure_heads(task, data.full_val_dataloader())
        if other is not None:
            # The same words, encoded with the vocabulary of the other run.
            words = evaluation_data(section, other.task).full_val_dataloader()
            compared[theirs] = attention_density(other.task, words)
            courses[theirs] = read_course(other.folder / ALPHA)
        if cfg.baselines:
            for name, fixed in {ENTMAX15: 1.5, SOFTMAX: 1.0}.items():
                if measured := measure_at(task, data.full_val_dataloader(), fixed):
                    baselines[name] = measured
    density = {layer: measured.density for layer, measured in heads.items()}
    alpha, top_k = alpha_per_head(task.model), top_k_per_layer(task.model)
    validation = [example.source for example in data.splits.val]
    shown = [word for word in given if word] if given is not None else _some(validation)
    console.print(alpha_table(alpha, density, top_k=top_k, compared=compared))
    console.print()
    console.print(roles_table(heads))
    console.print(ROLES_EXPLAINED, style="dim")
    worth = {}
    if cfg.worth:
        console.print()
        worth = measure_worth(task, data.full_val_dataloader(cfg.worth_words), console)
        console.print(worth_table(worth))
    report = Report(
        run=run,
        heads=heads,
        alpha=alpha,
        top_k=top_k,
        words=len(validation),
        sample=word_maps(task, shown[0]),
        read=read_batch(task, shown[:MOST_SHOWN]),
        compared=compared,
        courses=courses if any(courses.values()) else {},
        baselines=baselines,
        worth=worth,
    )
    folder = run.folder / FOLDER if cfg.output is None else Path(cfg.output).expanduser()
    files = write_report(report, folder, cfg.figures)
    console.print(f"\nmeasured on {report.words:,} validation words; written:")
    for file in files:
        console.print(f"  {short_path(file)}", markup=False, soft_wrap=True)
    if len(shown) > MOST_SHOWN:
        console.print(f"the page shows the first {MOST_SHOWN} of {len(shown):,} words")
    tokens = (len(tokens) for texts in (report.read.sources, report.read.written) for tokens in texts)
    if any(count > LONGEST_SHOWN for count in tokens):
        console.print(f"page and pictures show at most the first {LONGEST_SHOWN} tokens of a word and of its output")
    if cfg.alignments is not None:
        _write_alignments(cfg, task, given if given is not None else validation, data.max_length, console)
    return {layer: values.tolist() for layer, values in density.items()}


def _write_alignments(cfg: DictConfig, task: Any, words: list[str], longest: int, console: Console) -> None:
    file = Path(cfg.alignments).expanduser()
    write_lines(list(alignment_lines(task, words, cfg.align.heads, cfg.align.layer, longest)), file)
    names = {"all": "of all cross-attention layers", -1: "of the last cross-attention layer"}
    where = names.get(cfg.align.layer, f"of cross-attention layer {cfg.align.layer}")
    console.print(
        f"  {short_path(file.resolve())}: source-output pairs to which {RULES[cfg.align.heads]}, {where}",
        markup=False,
        soft_wrap=True,
    )


def _names(folder: Path, other: Path) -> tuple[str, str]:
    """The shortest different ends of two paths. Names alone may be equal: every sweep calls its runs 0, 1, 2, ..."""
    for count in range(1, len(folder.parts)):
        names = ("/".join(path.parts[-count:]) for path in (folder, other))
        if (ours := next(names)) != (theirs := next(names)):
            return ours, theirs
    return folder.name, other.name


def _some(words: list[str]) -> list[str]:
    """The word for the picture, and other words at equal distances in the data."""
    step = max(1, len(words) // SHOWN_BY_DEFAULT)
    return list(dict.fromkeys([choose_word(words), *words[::step]]))[:SHOWN_BY_DEFAULT]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def main() -> None:
    """Runs ``sparse-attn inspect``."""
    run_hydra("inspect", inspect)


if __name__ == "__main__":
    main()
