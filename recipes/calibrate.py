"""Find α for attention in a dense language model: ``sparse-attn calibrate`` or ``python -m recipes.calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from sparse_attn import calibrate as find_alpha

from .folders import check_output, check_output_folder, write_text
from .launch import run_hydra
from .report import alpha_table
from .report.huggingface import load_model, longest_input, model_folder, quiet
from .run import short_path

# Characters that are tokenised for each token of a block; nearly all texts need fewer. If no part of the text gives
# enough tokens, the number is doubled.
_CHARACTERS_PER_TOKEN = 12
_MASKED = 0.15  # share of the tokens that are hidden from a masked language model, as in BERT


def calibrate(cfg: DictConfig) -> dict[str, list[float]]:
    """Finds α of every head for a density or a bounded loss; prints α, density, and the loss before and after.

    Args:
        cfg: ``configs/calibrate.yaml``, composed by Hydra.

    Returns:
        Layer name -> α of each head.

    Raises:
        FileNotFoundError: If the model folder or the text file is missing.
        ValueError: If a value is not allowed, the model is not a causal or masked language model, or the text is too
            short or not UTF-8.
    """
    for name in ("hf_model", "text"):
        if cfg[name] is None:
            meaning = {
                "hf_model": "model=DIR, the folder of a Hugging Face model",
                "text": "text=FILE, the text that the model reads",
            }
            raise ValueError(f"{name.removeprefix('hf_')} has no value; give it as {meaning[name]}")
    for name in ("tokens", "batch_size", "batches"):
        if type(cfg[name]) is not int or cfg[name] < (2 if name == "tokens" else 1):
            raise ValueError(
                f"{name} must be a whole number of at least {2 if name == 'tokens' else 1}, got {cfg[name]}"
            )
    files = {key: check_output(key, str(cfg[key])) for key in ("output", "state") if cfg[key] is not None}
    save = None if cfg.save is None else check_output_folder("save", str(cfg.save))
    folder, text = model_folder(cfg.hf_model), _read(cfg.text)
    with quiet():
        model, tokenizer = load_model(folder, "softmax")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = _batches(model, tokenizer, text, cfg.tokens, cfg.batch_size, cfg.batches)
    target = {"density": cfg.density, "loss_increase": cfg.loss_increase, "per": cfg.per, "alpha_max": cfg.alpha_max}
    found = find_alpha(model, batches, **target, state=cfg.state)
    console = Console(highlight=False)
    as_tensors = [{name: torch.tensor(values) for name, values in each.items()} for each in (found, found.density)]
    console.print(alpha_table(*as_tensors))
    pieces = sum(batch["input_ids"].numel() for batch in batches)
    densities = [density for values in found.density.values() for density in values]
    console.print(f"\nloss {found.loss_before:.4f} dense, {found.loss_after:.4f} with these α, on {pieces:,} tokens")
    console.print(f"density {sum(densities) / len(densities):.4f}, the mean of all heads")
    if "output" in files:
        write_text(files["output"], json.dumps(found, indent=2) + "\n")
        console.print(f"written: {cfg.output}", markup=False, soft_wrap=True)
    if save is not None:
        _save(model, tokenizer, found, cfg.alpha_max, save)
        console.print(f"written: {short_path(save.resolve())}", markup=False, soft_wrap=True)
    return dict(found)


def _read(file: str) -> str:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no text file {file!r}; give an existing file as text=FILE") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be a file in UTF-8, got {file!r}: {error}") from None
    if not text.strip():
        raise ValueError(f"text must be a file with text, got no text in {file!r}")
    return text


def _batches(
    model: Any, tokenizer: Any, text: str, tokens: int, batch_size: int, batches: int
) -> list[dict[str, Tensor]]:
    """Batches of blocks of tokens at equal distances in the text, with labels."""
    from transformers.models.auto import modeling_auto

    kind = type(model).__name__
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    if not masked and kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"model must be a causal or a masked language model, got {kind}")
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(f"model must have a mask token in its tokenizer, got {kind} without a mask token")
    longest = longest_input(model)
    length = tokens if longest is None else min(tokens, longest)
    blocks = read_blocks(tokenizer, text, length, batches * batch_size)
    generator = torch.Generator().manual_seed(0)
    found = []
    for ids in torch.tensor(blocks).split(batch_size):
        labels = ids
        if masked:
            hidden = torch.rand(ids.shape, generator=generator) < _MASKED
            hidden[:, 0] = True  # so that every batch has a label
            ids, labels = ids.masked_fill(hidden, tokenizer.mask_token_id), ids.masked_fill(~hidden, -100)
        found.append({"input_ids": ids.to(model.device), "labels": labels.to(model.device)})
    return found


def read_blocks(tokenizer: Any, text: str, length: int, number: int) -> list[list[int]]:
    """At most ``number`` blocks of ``length`` tokens at equal distances; a shorter text gives one shorter block.

    Raises:
        ValueError: If the text has fewer than 2 tokens.
    """

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    width = _CHARACTERS_PER_TOKEN * length
    while len(text) > width * number:  # a long text is not tokenised as a whole
        starts = (index * (len(text) - width) // max(number - 1, 1) for index in range(number))
        parts = (ids_of(text[start : start + width]) for start in starts)
        if blocks := [ids[:length] for ids in parts if len(ids) >= length]:
            return blocks
        width *= 2
    ids = ids_of(text)
    if len(ids) < 2:
        raise ValueError(f"text must hold at least 2 tokens, got {len(ids)}")
    whole = [ids[start : start + length] for start in range(0, len(ids), length)]
    complete = [block for block in whole if len(block) == length] or whole[:1]
    step = max(len(complete) / number, 1)
    return [complete[int(index * step)] for index in range(min(number, len(complete)))]


def _save(model: Any, tokenizer: Any, found: dict[str, list[float]], alpha_max: float, folder: Path) -> None:
    from sparse_attn.integrations.huggingface import add_alpha

    model.set_attn_implementation("entmax")
    add_alpha(model, alpha_init=found, alpha_range=(1.0, max(2.0, float(alpha_max))))
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run_hydra("calibrate", calibrate)
