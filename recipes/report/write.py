"""The report of a run: pictures, a file of rows, and a page that holds them all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from ..curves import read_rows
from ..folders import write_text
from ..run import ALPHA, RESULTS, Run
from . import html
from .maps import WordMaps, attention_figure
from .measure import OFFSETS, LayerHeads
from .plots import alpha_course, heat_map, save
from .tables import ROLES_EXPLAINED, SPLIT_NAMES, head_rows, percent, setting, write_rows

FOLDER = "report"


@dataclass(frozen=True)
class Report:
    """Everything a report tells about a run.

    Attributes:
        run: the run.
        heads: layer name -> what its heads do on validation data.
        alpha: layer name -> (H,), of layers that have an α.
        top_k: layer name -> k, of top-k layers.
        words: number of validation words that were measured.
        sample: the attention of one word.
        compared: name -> density of the same layers in another run.
    """

    run: Run
    heads: Mapping[str, LayerHeads]
    alpha: Mapping[str, Tensor]
    top_k: Mapping[str, int]
    words: int
    sample: WordMaps
    compared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def write_report(report: Report) -> list[Path]:
    """Write the report into the run folder, over an earlier one.

    Returns:
        The files: report.html, alpha.png, alpha_course.png (if the run recorded α), attention.png, heads.csv.
    """
    folder = report.run.folder / FOLDER
    folder.mkdir(exist_ok=True)
    density = {layer: measured.density for layer, measured in report.heads.items()}
    page, heat, course, attention, heads = (
        folder / name for name in ("report.html", "alpha.png", "alpha_course.png", "attention.png", "heads.csv")
    )
    save(heat_map(report.alpha, density, report.top_k), heat)
    rows = read_course(report.run.folder / ALPHA)
    if rows:
        save(alpha_course(rows), course)
    save(attention_figure(report.sample, report.alpha, report.top_k), attention)
    write_rows(head_rows(report.heads, report.alpha, report.top_k), heads)
    write_text(page, _page(report, heat, course if rows else None, attention))
    return [page, heat, *([course] if rows else []), attention, heads]


def read_course(file: Path) -> list[tuple[int, str, int, float]]:
    """The rows (step, layer, head, α) of a run's alpha.csv; none if there is no such file.

    Rows that cannot be read are left out: a training that was killed may have cut one short.
    """
    rows = []
    for row in read_rows(file):
        with contextlib.suppress(KeyError, ValueError):
            rows.append((int(row["step"]), row["layer"], int(row["head"]), float(row["alpha"])))
    return rows


def _page(report: Report, heat: Path, course: Path | None, attention: Path) -> str:
    run = report.run
    prediction = f"{report.sample.word} → {report.sample.prediction}"
    sections = [
        ("Results", _results(run.folder / RESULTS)),
        (
            "α and attention density of every head",
            html.paragraph(
                "Density is the share of the visible pairs of positions with a non-zero weight, measured on "
                f"{report.words:,} validation words. Softmax: α = 1 and a density of 100%; sparsemax: α = 2."
            )
            + html.picture(heat, "heat map of α and density, layers by heads"),
        ),
        (
            "Course of α over training",
            html.picture(course, "α of each head by training step")
            if course
            else html.paragraph("This run recorded no α."),
        ),
        (
            f"Attention for one word: {prediction}",
            html.paragraph("The last layer of each kind. White weights are exactly zero.")
            + html.picture(attention, f"attention weights for {prediction}"),
        ),
        ("Heads in numbers", html.table(_heads(report)) + html.paragraph(f"Roles. {ROLES_EXPLAINED}")),
        ("Configuration", html.folded("config.yaml", OmegaConf.to_yaml(run.config))),
    ]
    return html.page(f"sparse-attn run {run.folder.parent.name}/{run.folder.name}", sections)


def _heads(report: Report) -> list[dict[str, str]]:
    rows = []
    for layer, measured in report.heads.items():
        for head, role in enumerate(measured.roles):
            others = {
                f"density, {name}": percent(float(density[layer][head])) for name, density in report.compared.items()
            }
            weights = {
                f"weight on {position}": f"{float(measured.weight[position][head]):.2f}"
                if position in measured.weight
                else ""
                for position in OFFSETS
            }
            rows.append(
                {
                    "layer": layer,
                    "head": str(head),
                    "α": setting(layer, head, report.alpha, report.top_k),
                    "density": percent(float(measured.density[head])),
                    "density, softmax": "100%",
                    **others,
                    "entropy, nats": f"{float(measured.entropy[head]):.2f}",
                    **weights,
                    "role": role,
                }
            )
    return rows


def _results(file: Path) -> str:
    """The error rates that the training ended with."""
    if not file.is_file():
        return html.paragraph("None: the training was stopped before its end.")
    content: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        {
            "words": name,
            "PER, %": f"{content[f'{split}/per']:.2f}",
            "WER, %": f"{content[f'{split}/wer']:.2f}",
            "loss per token": f"{content[f'{split}/loss']:.3f}",
        }
        for split, name in SPLIT_NAMES.items()
    ]
    return html.table(rows) + html.paragraph(f"The run took {content['seconds']:.0f} seconds.")
