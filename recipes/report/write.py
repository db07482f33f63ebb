"""The report of a run: pictures, a CSV file, a JSON file, and a page with the pictures and the numbers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from sparse_attn.analysis import HeadChange

from ..curves import read_rows, write_rows
from ..folders import replacing, write_text
from ..run import RESULTS, Run
from ..seq2seq.metrics import METRICS
from . import html
from .maps import WordMaps, attention_figure, rollout_figure
from .measure import OFFSETS, LayerHeads
from .page import run_view
from .plots import alpha_course, drawn, heat_map
from .tables import ROLES_EXPLAINED, SPLIT_NAMES, head_rows, percent, setting
from .words import ReadWords
from .worth import CHANGES

FOLDER = "report"
FIGURES = ("png", "svg", "pdf")
SOFTMAX, ENTMAX15 = "α = 1", "α = 1.5"


@dataclass(frozen=True)
class Report:
    """The content of a report about a run.

    Attributes:
        run: the run.
        heads: layer name -> measurements of its heads on validation data.
        alpha: layer name -> (H,), for layers with an α.
        top_k: layer name -> k, for top-k layers.
        words: number of validation words that were measured.
        sample: the attention of one word.
        read: the words whose attention the page shows.
        compared: name -> density of the same layers in another run.
        courses: run -> its α over training, beginning with this run; a run that recorded none has no rows.
        baselines: α -> the same measurements with this α in every head that learns α.
        worth: change -> layer name -> change of the loss with one head changed.
    """

    run: Run
    heads: Mapping[str, LayerHeads]
    alpha: Mapping[str, Tensor]
    top_k: Mapping[str, int]
    words: int
    sample: WordMaps
    read: ReadWords
    compared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    courses: Mapping[str, list[tuple[int, str, int, float]]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, LayerHeads]] = field(default_factory=dict)
    worth: Mapping[HeadChange, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def further(self) -> dict[str, dict[str, Tensor]]:
        """Optional statistics of every head: name -> layer name -> (H,)."""
        found = {
            f"density at {name}": {layer: measured.density for layer, measured in baseline.items()}
            for name, baseline in self.baselines.items()
        }
        found |= {f"density, {name}": dict(density) for name, density in self.compared.items()}
        return found | {f"loss when {CHANGES[change]}": dict(found) for change, found in self.worth.items()}


def write_report(report: Report, folder: Path, figures: str = "png") -> list[Path]:
    """Write the report into a folder. The files of an earlier report are replaced.

    Args:
        report: the content.
        folder: the output folder; created if it does not exist.
        figures: "png", "svg" or "pdf".

    Returns:
        The files: report.html, heads.csv, numbers.json, and as pictures alpha, alpha_course (if the run recorded α),
        attention and rollout.
    """
    density = {layer: measured.density for layer, measured in report.heads.items()}
    rows = next(iter(report.courses.values()), [])
    pictures = {
        "alpha": heat_map(report.alpha, density, report.top_k),
        **({"alpha_course": alpha_course(rows)} if rows else {}),
        "attention": attention_figure(report.sample, report.alpha, report.top_k),
        "rollout": rollout_figure(report.read),
    }
    table = head_rows(report.heads, report.alpha, report.top_k, report.further)
    embedded = {name: drawn(figure) for name, figure in pictures.items()}
    view = run_view(
        f"sparse-attn run {report.run.folder.parent.name}/{report.run.folder.name}",
        report.read,
        report.heads,
        report.alpha,
        courses=report.courses,
        further=report.further,
        sections=_sections(report, embedded),
    )
    # Everything is drawn before the first file is written, so that an error leaves the old files unchanged.
    files = {
        folder / f"{name}.{figures}": embedded[name] if figures == "png" else drawn(figure, figures)
        for name, figure in pictures.items()
    }
    numbers = json.dumps(_numbers(report, table), indent=2, ensure_ascii=False) + "\n"
    folder.mkdir(exist_ok=True, parents=True)
    page = view.save(folder / "report.html")
    for file, content in files.items():
        with replacing(file) as unfinished:
            unfinished.write_bytes(content)
    write_rows(folder / "heads.csv", table, list(table[0]))
    write_text(folder / "numbers.json", numbers)
    return [page, *files, folder / "heads.csv", folder / "numbers.json"]


def _numbers(report: Report, table: list[dict[str, str]]) -> dict[str, Any]:
    """The measurements of a report, for programs."""

    def value(text: str) -> float | int | str | None:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text or None

    return {
        "run": str(report.run.folder),
        "words_measured": report.words,
        "heads": [{name: value(cell) for name, cell in row.items()} for row in table],
        "diversity": {name: _diversities(measured) for name, measured in _by_alpha(report).items()},
        "words": [
            {"word": word, "output": output}
            for word, output in zip(report.read.words, report.read.outputs, strict=True)
        ],
    }


def _by_alpha(report: Report) -> dict[str, Mapping[str, LayerHeads]]:
    return {"learnt": report.heads, **report.baselines}


def _diversities(heads: Mapping[str, LayerHeads]) -> dict[str, float]:
    return {layer: round(measured.diversity, 6) for layer, measured in heads.items()}


def read_course(file: Path) -> list[tuple[int, str, int, float]]:
    """The rows (step, layer, head, α) of a run's alpha.csv; none if there is no such file.

    Rows that cannot be read are left out: a training that was killed may have cut one short. Rows without a
    finite α are left out too: a training may diverge after its best checkpoint.
    """
    rows = []
    for row in read_rows(file):
        with contextlib.suppress(KeyError, ValueError):
            rows.append((int(row["step"]), row["layer"], int(row["head"]), float(row["alpha"])))
    return [row for row in rows if math.isfinite(row[-1])]


def _sections(report: Report, pictures: Mapping[str, bytes]) -> list[tuple[str, str]]:
    run = report.run
    prediction = f"{report.sample.word} → {report.sample.prediction}"
    return [
        ("Results", _results(run.folder / RESULTS, run.config.data.get("metrics") or ("per", "wer"))),
        (
            "α and attention density of every head",
            html.paragraph(
                "Density is the share of the visible pairs of positions with a non-zero weight, measured on "
                f"{report.words:,} validation words. Softmax: α = 1 and a density of 100%; sparsemax: α = 2."
            )
            + html.picture(pictures["alpha"], "heat map of α and density, layers by heads"),
        ),
        (
            "α over training",
            html.picture(pictures["alpha_course"], "α of each head by training step")
            if "alpha_course" in pictures
            else html.paragraph("This run recorded no α."),
        ),
        (
            f"Attention for one word: {prediction}",
            html.paragraph("The last layer of each kind. White weights are exactly zero.")
            + html.picture(pictures["attention"], f"attention weights for {prediction}"),
        ),
        ("Heads in numbers", html.table(_heads(report)) + html.paragraph(f"Roles. {ROLES_EXPLAINED}")),
        *_worth(report),
        ("Diversity of heads", html.paragraph(_diversity_explained(report)) + html.table(_diversity_rows(report))),
        (
            "Attention rollout in the encoder",
            html.paragraph(
                "Share of each input token in each encoder state after all layers; the mean of the heads and the "
                "residual connection count half each (Abnar & Zuidema 2020)."
            )
            + html.picture(pictures["rollout"], f"attention rollout for {report.read.words[0]}"),
        ),
        ("Configuration", html.folded("config.yaml", OmegaConf.to_yaml(run.config))),
    ]


def _worth(report: Report) -> list[tuple[str, str]]:
    if not report.worth:
        return []
    layers = dict.fromkeys(layer for found in report.worth.values() for layer in found)
    rows = [
        {
            "layer": layer,
            "head": str(head),
            **{
                CHANGES[change]: f"{1000 * float(found[layer][head]):+.2f}" if layer in found else ""
                for change, found in report.worth.items()
            },
        }
        for layer in layers
        for head in range(len(report.heads[layer].roles))
    ]
    explained = "Change of the loss of a token, in thousandths, when one head is changed and all others stay."
    return [("Effect of each head on the loss", html.paragraph(explained) + html.table(rows))]


def _diversity_explained(report: Report) -> str:
    explained = (
        "Jensen-Shannon divergence between the heads of a layer, in nats, averaged over queries: 0 if all heads have "
        "the same weights (Correia, Niculae & Martins 2019, section 5.1)."
    )
    if not report.baselines:
        return explained
    return explained + (
        " For comparison, the same model with one α in all heads that learn α. It was not trained with this α."
    )


def _diversity_rows(report: Report) -> list[dict[str, str]]:
    # Without baselines, the only column is not called "learnt", since α may be fixed.
    columns = _by_alpha(report) if report.baselines else {"diversity": report.heads}
    found = {name: _diversities(measured) for name, measured in columns.items()}
    return [
        {"layer": layer, **{name: f"{values[layer]:.3f}" for name, values in found.items()}} for layer in report.heads
    ]


def _heads(report: Report) -> list[dict[str, str]]:
    rows = []
    for layer, measured in report.heads.items():
        for head, role in enumerate(measured.roles):
            others = {
                f"density, {name}": percent(float(density[layer][head])) for name, density in report.compared.items()
            }
            others |= {
                f"density at {name}": percent(float(baseline[layer].density[head]))
                for name, baseline in report.baselines.items()
                if name != SOFTMAX
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


def _results(file: Path, metrics: Sequence[str]) -> str:
    """The final metrics of the training."""
    if not file.is_file():
        return html.paragraph("None: the training was stopped before its end.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return html.paragraph(f"None: {file.name} cannot be read, it is cut short or damaged.")

    def number(key: str, digits: int) -> str:
        return f"{content[key]:.{digits}f}" if isinstance(content.get(key), int | float) else "-"

    rows = [
        {
            "words": words,
            **{METRICS[name].label: number(f"{split}/{name}", 2) for name in metrics if name in METRICS},
            "loss per token": number(f"{split}/loss", 3),
        }
        for split, words in SPLIT_NAMES.items()
    ]
    return html.table(rows) + html.paragraph(f"The run took {number('seconds', 0)} seconds.")
