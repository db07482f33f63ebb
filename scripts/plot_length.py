"""Draw docs/length_generalisation.png: the accuracy of runs of the experiment `length` over the length of the test.

    python scripts/plot_length.py SWEEP [FILE]

SWEEP contains the runs, several seeds of each setting: a point is a mean over the seeds, a bar the standard deviation.
The same picture in dark colours is written beside FILE, as length_generalisation_dark.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from plot_mappings import DARK  # Python puts the folder of a script on its path

from recipes.compare import Setting, find_runs, group_runs

METRICS = {"accuracy": "sequences that are exactly right, in percent", "per": "wrong tokens (PER), in percent"}


def main(sweep: str, file: Path) -> None:
    """Draw and save in light and in dark colours."""
    settings = group_runs(find_runs([sweep])[0])
    draw(settings, file)
    with plt.style.context(["dark_background", DARK]):
        draw(settings, file.with_stem(f"{file.stem}_dark"))


def draw(settings: list[Setting], file: Path) -> None:
    """Draw one panel for each metric, one line for each setting; dashed lines are settings with length scaling."""
    data = settings[0].runs[0].config.data.generate
    lengths = [factor * data.length for factor in data.factors]
    kinds = list(dict.fromkeys(_without_scaling(setting) for setting in settings))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(10, 3.6))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for setting in settings:
            names = [f"{metric}/x{factor}" for factor in data.factors]
            axis.errorbar(
                lengths,
                [setting.mean(name) for name in names],
                [setting.deviation(name) or 0.0 for name in names],
                marker="o",
                capsize=3,
                linestyle="--" if setting.values.get("model.length_scaling") == "True" else "-",
                color=f"C{kinds.index(_without_scaling(setting))}",
                label=setting.name.replace("model.", "").lower(),
            )
        axis.axvline(data.length, linestyle=":", color="grey")  # the longest sequence in training
        axis.set(xscale="log", title=title, xlabel="length of the sequences", ylim=(-3, 103))
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _without_scaling(setting: Setting) -> str:
    """The values of a setting, except that of the length scaling."""
    return " ".join(f"{key}={value}" for key, value in setting.values.items() if key != "model.length_scaling")


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[1] / "docs"
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else docs / "length_generalisation.png")
