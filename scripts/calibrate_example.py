"""Trains a small language model, calibrates α for several densities, and trains further (docs/howto/calibrate.md).

The text is Python's own help (`pydoc_data.topics`), so that no download is needed. Needs the extra hf.

    python scripts/calibrate_example.py              print the table; takes some minutes on one core
    python scripts/calibrate_example.py --save DIR   save the dense model and its text, for `sparse-attn calibrate`
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from sparse_attn import calibrate
from sparse_attn.integrations.huggingface import add_alpha, register
from sparse_attn.optim import alpha_param_groups

LENGTH, BATCH, VOCABULARY = 128, 8, 1024
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03)


def tokenizer_of(text: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair tokenizer that is learnt from the text."""
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator([text], vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    with tempfile.TemporaryDirectory() as folder:
        words.save(str(Path(folder, "words.json")))
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "words.json")), **special)


def batches_of(ids: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Batches with labels, from shuffled blocks of the text."""
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": blocks[part], "labels": blocks[part]} for part in order.split(BATCH) if len(part) == BATCH]


def train(model: Any, ids: Tensor, steps: int, rate: float) -> None:
    """Train with AdamW; α has a larger learning rate."""
    groups = alpha_param_groups(model, lr=rate, weight_decay=0.01, alpha_lr=10 * rate, strict=False)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)
    epochs = itertools.chain.from_iterable(batches_of(ids, epoch) for epoch in itertools.count())
    model.train()
    for batch in itertools.islice(epochs, steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def loss_of(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """The mean loss."""
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def main() -> None:
    """Trains, calibrates, trains further, and prints one row per density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="only save the dense model and its text to this folder")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the dense training")
    parser.add_argument("--more", type=int, default=150, help="steps of the training after the calibration")
    options = parser.parse_args()
    torch.manual_seed(0)
    register()
    text = "\n".join(topics.values())
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    split = int(0.9 * len(ids))
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))
    train(model, ids[:split], options.steps, 2e-3)
    if options.save is not None:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
        Path(options.save, "held_out.txt").write_text(tokenizer.decode(ids[split:]), encoding="utf-8")
        return
    held_out = batches_of(ids[split:], 0)
    seen, rest = held_out[:8], held_out[8:]
    continued = copy.deepcopy(model)
    train(continued, ids[:split], options.more, 3e-4)
    print(f"{len(ids):,} tokens; dense: loss {loss_of(model, rest):.3f}, {options.more} steps later ", end="")
    print(f"{loss_of(continued, rest):.3f}\n")
    print(f"| density wanted | found | α from | to | loss | {options.more} steps later |")
    print("|---|---|---|---|---|---|")
    for wanted in DENSITIES:
        found = calibrate(model, seen, density=wanted, progress=False)
        sparse = copy.deepcopy(model)
        sparse.set_attn_implementation("entmax")
        add_alpha(sparse, alpha_init=found)
        before = loss_of(sparse, rest)
        train(sparse, ids[:split], options.more, 3e-4)
        alphas = [alpha for values in found.values() for alpha in values]
        densities = [density for values in found.density.values() for density in values]
        numbers = f"{sum(densities) / len(densities):.3f} | {min(alphas):.2f} | {max(alphas):.2f} | {before:.3f}"
        print(f"| {wanted} | {numbers} | {loss_of(sparse, rest):.3f} |", flush=True)


if __name__ == "__main__":
    main()
