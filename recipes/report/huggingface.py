"""Report on the heads of a Hugging Face model saved in a folder: ``sparse-attn inspect model=DIR text="..."``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from sparse_attn.analysis import AttentionRecord, record_attention
from sparse_attn.analysis.alignment import align
from sparse_attn.viewer import AttentionView, attention_view

from ..curves import write_rows
from ..folders import write_text
from ..run import short_path
from .alignments import RULES, check_alignment, write_lines
from .tables import ROLES_EXPLAINED, alpha_table, roles_table
from .write import FOLDER

ATTENTION = ("entmax", "entmax15", "sparsemax", "topk", "softmax")
LONGEST_OUTPUT = 64
_SOFTMAX = "sparse_attn_softmax"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# If all of these files are missing, transformers still builds a tokenizer for some models, and does not warn.
_TOKENIZER = ("tokenizer*", "vocab*", "*.model")


def inspect_model(cfg: DictConfig) -> dict[str, list[float]]:
    """Prints α, density and role of every head for one text, and writes a page, numbers and a picture.

    Args:
        cfg: ``configs/inspect.yaml``, composed by Hydra, with ``model`` and ``text``.

    Returns:
        Layer name -> density of each head.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder contains no model, the text does not fit the model, or a value is not allowed.
    """
    if cfg.compare is not None:
        raise ValueError(f"compare is only for run=DIR, got compare={cfg.compare} with model={cfg.hf_model}")
    for name in ("words", "word", "input"):
        if cfg[name] is not None:
            raise ValueError(f'{name} is only for run=DIR; the input of a Hugging Face model is given as text="..."')
    if cfg.worth:
        raise ValueError("worth is for run=DIR, since a loss needs data with targets; got worth=true with model=DIR")
    if not isinstance(cfg.text, str) or not cfg.text.strip():
        raise ValueError(f'text has no value; give it as text="...", the input of the model; got {cfg.text!r}')
    folder = model_folder(cfg.hf_model)
    with quiet():
        model, tokenizer = load_model(folder, cfg.attention)
        record, tokens, memory = _run(model, tokenizer, cfg.text, cfg.target)
    view = attention_view(record, tokens, memory, title=folder.name)
    crossing = [layer for layer in view.layers if layer.kind == "cross"]
    if cfg.alignments is not None:
        if not crossing:
            raise ValueError(f"alignments need cross-attention, got {type(model).__name__} without cross-attention")
        check_alignment(cfg.align.heads, cfg.align.layer, len(crossing))
    console = Console(highlight=False)
    density = {name: heads.density for name, heads in record.items()}
    alpha = {name: heads.alpha for name, heads in record.items() if heads.alpha is not None}
    console.print(alpha_table(alpha, density))
    console.print()
    console.print(roles_table({layer.name: layer for layer in view.layers}))
    console.print(ROLES_EXPLAINED, style="dim")
    if memory is not None:
        console.print(f"\noutput tokens: {' '.join(tokens)}", markup=False)
    output = folder / FOLDER if cfg.output is None else Path(cfg.output).expanduser()
    files = _write(view, output, cfg.figures)
    console.print("\nwritten:")
    for file in files:
        console.print(f"  {short_path(file.resolve())}", markup=False, soft_wrap=True)
    if cfg.alignments is not None:
        line = _alignment(view, cfg, set(tokenizer.all_special_tokens))
        write_lines([line], Path(cfg.alignments).expanduser())
        console.print(f"  {cfg.alignments}: pairs of tokens to which {RULES[cfg.align.heads]}", markup=False)
    return {name: values.tolist() for name, values in density.items()}


def model_folder(given: str) -> Path:
    """The folder of a model with its weights and its tokenizer.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is missing in the folder, or transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("model=DIR needs transformers: pip install 'sparse-attn[hf]'")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {str(given)!r}; give a folder that save_pretrained has written")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be a folder with config.json, got {str(given)!r} without this file")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise ValueError(f"model must be a folder with weights (model.safetensors), got {str(given)!r} without weights")
    if not any(file for pattern in _TOKENIZER for file in folder.glob(pattern)):
        raise ValueError(f"model must be a folder with a tokenizer (tokenizer.json), got {str(given)!r} without one")
    return folder.resolve()


def load_model(folder: Path, attention: str | None) -> tuple[Any, Any]:
    """The model of a folder in evaluation mode, and its tokenizer.

    Args:
        folder: As :func:`model_folder` returns it.
        attention: The attn_implementation; None for the model's learnt α, or for softmax if the model has none.

    Raises:
        ValueError: If ``attention`` is unknown, or the model or the tokenizer cannot be loaded.
    """
    import transformers
    from safetensors import SafetensorError

    from sparse_attn.integrations.huggingface import load_alpha, register
    from sparse_attn.integrations.huggingface.alpha import RANGE_KEY

    if attention is not None and attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    register()
    # With α = 1, the attention of this library is softmax, and its weights can be recorded.
    register(_SOFTMAX, alpha=1.0)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model must be one that transformers knows, got {str(folder)!r}: {_line(error)}") from error
    learnt = getattr(config, RANGE_KEY, None) is not None and attention in (None, "entmax")
    name = "entmax" if learnt else _SOFTMAX if attention in (None, "softmax") else attention
    architecture = next(iter(config.architectures or ()), "AutoModel")
    kind = getattr(transformers, architecture, transformers.AutoModel)
    try:
        model = kind.from_pretrained(folder, attn_implementation=name, local_files_only=True, dtype=torch.float32)
        if learnt:
            load_alpha(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model must hold weights that fit its config, got {str(folder)!r}: {_line(error)}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model must be a folder with a tokenizer, got {str(folder)!r}: {_line(error)}") from error
    return model.eval(), tokenizer


def longest_input(model: Any) -> int | None:
    """The largest number of tokens that a model of transformers reads; None if its config has no limit.

    RoBERTa and similar models count positions from the id of the padding plus one, so that no token uses the first
    entries of their table of positions.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    for module in model.modules():
        table, padding = getattr(module, "position_embeddings", None), getattr(module, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding) and isinstance(padding, int):
            longest = min(longest, table.num_embeddings - padding - 1)
    return longest


@torch.no_grad()
def _run(
    model: Any, tokenizer: Any, text: str, target: str | None
) -> tuple[AttentionRecord, list[str], list[str] | None]:
    """Runs a model on a text. Returns the attention, the tokens of the queries, and the encoder tokens or None."""
    inputs = tokenizer(text, return_tensors="pt")
    read = inputs["input_ids"]
    longest = longest_input(model)
    if not read.shape[1]:
        raise ValueError(f"text must hold at least one token, got none in {text!r}")
    if longest is not None and read.shape[1] > longest:
        raise ValueError(f"text must have at most the {longest} tokens that the model reads, got {read.shape[1]}")
    if target is not None and not model.config.is_encoder_decoder:
        raise ValueError(f"target is for encoder-decoder models, got {type(model).__name__}")
    if not model.config.is_encoder_decoder:
        with record_attention(model, weights=True) as record:
            model(**inputs)
        return record, tokenizer.convert_ids_to_tokens(read[0]), None
    if target is None:
        if not hasattr(model, "generate"):
            raise ValueError(f"target must be given, since {type(model).__name__} cannot generate text")
        steps = model.generate(**inputs, max_new_tokens=LONGEST_OUTPUT, num_beams=1, do_sample=False)
        steps = steps[:, :-1] if steps.shape[1] > 1 else steps
    else:
        written = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        start = torch.full_like(written[:, :1], model.config.decoder_start_token_id)
        steps = torch.cat([start, written[:, :-1]], dim=1)
    with record_attention(model, weights=True) as record:
        model(**inputs, decoder_input_ids=steps)
    return record, tokenizer.convert_ids_to_tokens(steps[0]), tokenizer.convert_ids_to_tokens(read[0])


def _write(view: AttentionView, folder: Path, figures: str) -> list[Path]:
    rows = [
        {"layer": layer.name, "kind": layer.kind, "head": head, "role": role}
        | {name: round(values[head], 6) for name, values in layer.numbers.items()}
        for layer in view.layers
        for head, role in enumerate(layer.roles)
    ]
    fields = list(dict.fromkeys(name for row in rows for name in row))
    shown = view.layers[0].maps[view.first]
    numbers = {"title": view.title, "tokens": list(shown.keys), "heads": rows}
    folder.mkdir(exist_ok=True, parents=True)
    files = [view.save(folder / "report.html"), view.save(folder / f"attention.{figures}")]
    write_rows(folder / "heads.csv", rows, fields)
    write_text(folder / "numbers.json", json.dumps(numbers, indent=2, ensure_ascii=True) + "\n")
    return [*files, folder / "heads.csv", folder / "numbers.json"]


def _alignment(view: AttentionView, cfg: DictConfig, special: set[str]) -> str:
    cross = [layer.maps[view.first] for layer in view.layers if layer.kind == "cross"]
    chosen = cross if cfg.align.layer == "all" else [cross[int(cfg.align.layer)]]
    weights = torch.cat([shown.weights for shown in chosen])
    # Each step generates the token that the next step reads; the token that the last step generates is
    # not read.
    written = [place for place, token in enumerate(chosen[0].queries[1:]) if token not in special]
    read = [place for place, token in enumerate(chosen[0].keys) if token not in special]
    pairs = align(weights[:, written][:, :, read], cfg.align.heads).mT.nonzero().tolist()
    return " ".join(f"{key}-{query}" for key, query in pairs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses messages and progress bars of transformers during a ``with`` block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """The first line of an error message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
