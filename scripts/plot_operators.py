"""Draw the pictures of docs/operators.md, one for each mapping.

python scripts/plot_operators.py [FOLDER]

The same pictures in dark colours are written to the same folder as NAME_dark.png.

Left: the probability of a score t beside two scores 0. Right: the probabilities of eight scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from sparse_attn import (
    budget_sparsemax,
    entmax,
    entmax15,
    normmax,
    sparse_softmax,
    sparsemax,
    topk_softmax,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

SCORES = torch.tensor([1.9, 1.4, 1.3, 0.8, 0.4, 0.0, -0.5, -1.1])

# picture -> legend -> mapping; every picture also has softmax as a dotted line
PICTURES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "entmax": {f"α = {alpha}": lambda x, alpha=alpha: entmax(x, alpha) for alpha in (0.75, 1.25, 1.5, 2.0, 4.0)},
    "entmax15": {"1.5-entmax": entmax15},
    "sparsemax": {"sparsemax": sparsemax},
    "topk_softmax": {f"k = {k}": lambda x, k=k: topk_softmax(x, k) for k in (1, 2, 3)},
    "sparse_softmax": {f"k = {k}": lambda x, k=k: sparse_softmax(x, k) for k in (1, 2, 3)},
    "normmax": {f"α = {alpha}": lambda x, alpha=alpha: normmax(x, alpha) for alpha in (1.25, 2.0, 10.0)},
    "budget_sparsemax": {f"budget {b}": lambda x, b=b: budget_sparsemax(x, b) for b in (1.0, 1.5, 2.5)},
}


DARK = {"figure.facecolor": "#131416", "axes.facecolor": "#131416", "savefig.facecolor": "#131416"}


def main(folder: Path) -> None:
    """Draw and save every picture, in light and in dark colours."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder, "")
    with plt.style.context(["dark_background", DARK]):
        draw(folder, "_dark", first=0.3)


def draw(folder: Path, suffix: str, first: float = 0.0) -> None:
    """Draw and save every picture; ``first`` is the place of the first curve on the colour map, whose start is dark."""
    for name, mappings in PICTURES.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
        rising = torch.linspace(-3, 3, 601)
        triples = torch.stack([rising, torch.zeros(601), torch.zeros(601)], -1)
        width = 0.8 / len(mappings)
        left.plot(rising, torch.softmax(triples, -1)[:, 0], ":", color="grey", label="softmax")
        right.plot(range(len(SCORES)), torch.softmax(SCORES, -1), ":", color="grey", label="softmax")
        for place, (label, mapping) in enumerate(mappings.items()):
            color = plt.cm.viridis(first + (1 - first) * place / max(len(mappings) - 0.7, 1))
            left.plot(rising, mapping(triples)[:, 0], color=color, label=label)
            position = torch.arange(len(SCORES)) + (place + 0.5) * width - 0.4
            right.bar(position.numpy(), mapping(SCORES).numpy(), width, color=color)
        left.set(xlabel="score t beside two scores 0", ylabel="its probability")
        right.set(xlabel="score", ylabel="probability")
        right.set_xticks(range(len(SCORES)), [f"{score:.1f}" for score in SCORES.tolist()])
        left.legend(frameon=False, fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / f"{name}{suffix}.png", dpi=90)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/operators"))
