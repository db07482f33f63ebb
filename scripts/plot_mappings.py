"""Draw docs/mappings.png: the mappings on the same scores, and a dense beside a sparse attention map.

python scripts/plot_mappings.py [FILE]

The same picture in dark colours is written to the same folder, as docs/mappings_dark.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

from sparse_attn import entmax, topk_softmax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

MAPPINGS = {
    "softmax (α = 1)": lambda x: entmax(x, 1.0),
    "1.5-entmax": lambda x: entmax(x, 1.5),
    "sparsemax (α = 2)": lambda x: entmax(x, 2.0),
    "top-2 softmax": lambda x: topk_softmax(x, 2),
}


DARK = {"figure.facecolor": "#131416", "axes.facecolor": "#131416", "savefig.facecolor": "#131416"}


def main(file: Path) -> None:
    """Draw and save in light and in dark colours."""
    draw(file)
    with plt.style.context(["dark_background", DARK]):
        draw(file.with_stem(f"{file.stem}_dark"), first=0.3)


def draw(file: Path, first: float = 0.0) -> None:
    """Draw and save; ``first`` is the place of the first bars on the colour map, whose lower end is dark."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), gridspec_kw={"width_ratios": [1.5, 1, 1]})
    scores = torch.tensor([1.6, 1.1, 0.9, 0.2, -0.3, -1.0])
    width = 0.8 / len(MAPPINGS)
    for place, (name, mapping) in enumerate(MAPPINGS.items()):
        position = torch.arange(len(scores)) + (place - 1.5) * width
        axes[0].bar(
            position.numpy(),
            mapping(scores).numpy(),
            width,
            label=name,
            color=plt.cm.viridis(first + (1 - first) * place / 3.3),
        )
    axes[0].set_xticks(range(len(scores)), [f"{score:.1f}" for score in scores.tolist()])
    axes[0].set(title="the same six scores", xlabel="score", ylabel="probability")
    axes[0].legend(frameon=False)

    torch.manual_seed(0)
    position = torch.arange(16.0)
    attention = -0.5 * (position[:, None] - position).abs() + torch.randn(16, 16)
    for axis, alpha, name in ((axes[1], 1.0, "softmax"), (axes[2], 1.5, "1.5-entmax")):
        weights = entmax(attention, alpha)
        density = (weights > 0).float().mean().item()
        shown = weights.masked_fill(weights == 0, float("nan"))  # an exact zero stays empty
        axis.imshow(shown.numpy(), cmap="viridis", vmin=0, vmax=1)
        axis.set(xticks=range(0, 16, 5), yticks=range(0, 16, 5))
        axis.set(title=f"{name}: {density:.0%} of the weights\nare not zero", xlabel="key", ylabel="query")
    figure.tight_layout()
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/mappings.png"))
