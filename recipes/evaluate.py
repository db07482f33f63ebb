"""Score a trained model: ``sparse-attn evaluate run=DIR`` or ``python -m recipes.evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from .bind import check_arguments, keys_named
from .build import build_decoding
from .ensemble import load_ensemble
from .folders import check_output
from .launch import run_hydra
from .report.overlap import overlap, overlap_table
from .report.scores import print_scores
from .report.search import search_table
from .run import Run, short_path, write_json
from .seq2seq.data import Seq2SeqData
from .seq2seq.data.examples import subset
from .seq2seq.data.tsv import read_split
from .seq2seq.decode import DECODINGS, Decoding
from .seq2seq.scores import score
from .seq2seq.search_space import SearchSpace
from .seq2seq.task import Seq2SeqTask

EVALUATION, ENSEMBLE = "evaluation.json", "ensemble.json"
SPLITS = {"val": ("val",), "test": ("test",), "both": ("val", "test")}
# This value in the config means "as in the training of the run". null already has another meaning: "no limit".
AS_TRAINED = "as_trained"
# The keys of a data section that an evaluation uses. The checkpoint stores how texts become tokens.
DATA_KEYS = (
    "name",
    "title",
    "train",
    "val",
    "test",
    "columns",
    "languages",
    "sides",
    "generate",
    "limit",
    "max_length",
    "eval_batch_size",
    "eval_batch_tokens",
)
FROM_FILES = ("tsv", "parallel")


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Scores a run or an ensemble of runs, prints the metrics of the data and writes them to a JSON file.

    Args:
        cfg: ``configs/evaluate.yaml``, composed by Hydra.

    Returns:
        The following values for validation, test or both, as ``split`` says; names of test values begin with ``test/``.

        - The metrics of the data, such as ``val/per``, and the number of inputs, ``val/words``.
        - ``val/loss`` and ``val/support``, which an ensemble does not have.
        - With ``decoding=exact``, the values of ``SearchSpace.summary``.
        - If the data have features and the training file of the run exists, the accuracy and the number of inputs of
          each part in `recipes.report.overlap`, such as ``val/known_both/accuracy`` and ``val/known_both/words``.

    Raises:
        FileNotFoundError: If a run, its checkpoint or a data file is missing.
        TypeError: If a setting has the wrong type.
        ValueError: If the split is unknown, a setting is outside its range, the data or a checkpoint cannot be read, or
            the runs of an ensemble have different vocabularies.
    """
    splits = _splits(cfg.split)
    decoding = chosen_decoding(cfg)
    output = None if cfg.output is None else check_output("output", str(cfg.output))
    ensemble = load_ensemble(cfg.run, cfg.checkpoint, cfg.average)
    run, several = ensemble.first, len(ensemble.runs) > 1
    section = data_section(run, given_data(cfg), splits)
    data = evaluation_data(section, run.task)
    console = Console(highlight=False)
    scores, searches = {}, {}
    for split in splits:
        space = SearchSpace(decoding.beam_size, decoding.budget) if decoding.name == "exact" else None
        decode = partial((space.decode if space else decoding.best), ensemble.models, max_length=ensemble.max_length)
        with console.status(f"scoring the {split} words"):
            loader = data.full_val_dataloader() if split == "val" else data.test_dataloader()
            scores[split] = score(run.task, loader, decode, losses=not several)
        if space:
            searches[split] = space.summary()
    results = {f"{split}/{name}": value for split, found in scores.items() for name, value in found.metrics().items()}
    results.update({f"{split}/words": len(found.sources) for split, found in scores.items()})
    results.update({f"{split}/{name}": value for split, found in searches.items() for name, value in found.items()})
    print_scores(console, scores)
    trained_on = training_sources(run)
    if trained_on:
        fields = run.task.source_tokenizer.fields
        parts = {split: overlap(found, fields, trained_on) for split, found in scores.items()}
        for split, found in parts.items():
            for part, (words, accuracy) in found.items():
                results |= {f"{split}/{part}/words": words, f"{split}/{part}/accuracy": accuracy}
        console.print()
        console.print(overlap_table(parts))
    if searches:
        console.print()
        console.print(search_table(searches, beam_size=decoding.beam_size, budget=decoding.budget))
    for split in splits:
        for note in data.notes_of(split):
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    file = output or run.folder / (ENSEMBLE if several else EVALUATION)
    settings = {
        **({"runs": [str(member.folder) for member in ensemble.runs]} if several else {}),
        "checkpoint": cfg.checkpoint,
        "average": cfg.average,
        "decoding": asdict(decoding),
        "data": section,
    }
    try:
        write_json(file, {**settings, **results})
    except OSError as error:
        advice = "" if output else ": give output=FILE"
        raise OSError(error.errno, f"{error.strerror}; the scores above were not saved{advice}", str(file)) from None
    console.print(f"\nwritten to {short_path(file)}", markup=False, soft_wrap=True)
    return results


def chosen_decoding(cfg: DictConfig) -> Decoding:
    """The decoding in the configuration of a command.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is outside its range.
    """
    if not isinstance(cfg.decoding, DictConfig):
        raise TypeError(f"decoding must be one of {', '.join(DECODINGS)}, got {cfg.decoding!r}")
    section: dict[str, Any] = OmegaConf.to_container(cfg.decoding)  # type: ignore[assignment]
    n_best = {} if cfg.get("n_best") is None else {"n_best": cfg.n_best}
    return build_decoding({**section, **n_best})


def given_data(cfg: DictConfig) -> dict[str, Any]:
    """The ``data`` section of a command that reads a run folder.

    Raises:
        TypeError: If the section is not a group of keys.
    """
    if not isinstance(cfg.data, DictConfig):
        raise TypeError(f"data must be a group of keys, such as data.val=FILE, got data={cfg.data}")
    given: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True)  # type: ignore[assignment]
    return given


def data_section(run: Run, given: dict[str, Any], splits: tuple[str, ...]) -> dict[str, Any]:
    """The ``data`` section for an evaluation: the section of the run, with the given keys replaced.

    If a file is given, the limit of the training does not apply. Without a limit, only the files of the evaluated
    splits must exist.

    Args:
        run: The run.
        given: The ``data`` section of the command; ``as_trained`` keeps the value of the run.
        splits: The splits to evaluate, ``val`` and ``test``.

    Raises:
        ValueError: If there is no file for a split.
    """
    given = {key: value for key, value in given.items() if value != AS_TRAINED}
    own: dict[str, Any] = OmegaConf.to_container(run.config.data, resolve=True)  # type: ignore[assignment]
    trained = {key: own[key] for key in DATA_KEYS if key in own}
    files = [key for key in ("train", "val", "test") if given.get(key) is not None]
    if files:
        trained["limit"] = None
        if trained["name"] not in FROM_FILES:
            trained = {**{key: value for key, value in trained.items() if key != "generate"}, "name": "tsv"}
    section = {**trained, **given}
    if section["name"] not in FROM_FILES:
        return section
    for split in splits:
        if section.get(split) is None:
            other = f" or split={'test' if split == 'val' else 'val'}" if len(splits) > 1 else ""
            raise ValueError(
                f"no {split} file: the run was trained on {run.config.data.name}, got "
                f"{', '.join(f'data.{key}' for key in files) or 'data.name=tsv'}; give data.{split}=FILE{other}"
            )
    if section.get("limit") is None:
        # The training words are needed only for a limit, which keeps the same share of every split.
        section.update({key: section[splits[0]] for key in ("train", "val", "test") if key not in splits})
    return section


def evaluation_data(section: dict[str, Any], task: Seq2SeqTask) -> Seq2SeqData:
    """Loaders that encode with the vocabularies of a trained model.

    Args:
        section: Arguments of ``Seq2SeqData``, from ``data_section``.
        task: The trained model.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is unknown, or the data cannot be read.
    """
    check_arguments(Seq2SeqData, "data", section)
    with keys_named("data", section):
        data = Seq2SeqData(**section)
        data.use_tokenizers(task.source_tokenizer, task.target_tokenizer)
        data.setup()
    return data


def training_sources(run: Run) -> list[str]:
    """The training inputs of a run; none if the inputs have no features, or a training file is missing."""
    if "features" not in run.task.source_tokenizer.fields:
        return []
    own: Any = OmegaConf.to_container(run.config.data, resolve=True)
    try:
        examples = read_split(own["train"], own["columns"], own.get("languages"))
    except FileNotFoundError:
        return []
    return [example.source for example in subset(examples, own.get("limit"))]


def _splits(split: Any) -> tuple[str, ...]:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS[split]


def main() -> None:
    """Runs ``sparse-attn evaluate``."""
    run_hydra("evaluate", evaluate)


if __name__ == "__main__":
    main()
