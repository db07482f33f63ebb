"""Print the results of finished runs as a Markdown table: one row per data set and attention, over all seeds.

python scripts/tabulate_runs.py FOLDER ...        every FOLDER is searched for run folders
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def main(folders: list[str]) -> None:
    """Read and print."""
    found = sorted(file for folder in folders for file in Path(folder).rglob("results.json"))
    if not found:
        sys.exit(
            f"FOLDER must hold at least one finished run (a results.json), got none in {', '.join(folders) or '-'}"
        )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in found:
        config = OmegaConf.load(file.parent / "config.yaml")
        data = config.data.get("language") or config.data.name
        kinds = [config.model[f"{place}_attention"] for place in ("encoder", "decoder", "cross")]
        kind = kinds[0] if len(set(kinds)) == 1 else " / ".join(kinds)
        groups[data, kind].append({"seed": config.seed, **json.loads(file.read_text(encoding="utf-8"))})
    print("| data | attention | seeds | test WER of each | test WER | test PER | validation WER |")
    print("|---|---|---|---|---|---|---|")
    for (data, kind), runs in sorted(groups.items()):
        runs.sort(key=lambda run: run["seed"])
        each = " ".join(f"{run['test/wer']:.2f}" for run in runs)
        means = " | ".join(_mean(runs, name) for name in ("test/wer", "test/per", "val/wer"))
        print(f"| {data} | {kind} | {len(runs)} | {each} | {means} |")


def _mean(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


if __name__ == "__main__":
    main(sys.argv[1:])
