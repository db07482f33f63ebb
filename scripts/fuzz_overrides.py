"""Gives odd values to the keys of ``sparse-attn train``: python scripts/fuzz_overrides.py [--count 100] [--seed 0].

Each override changes one key of a tiny training on random data. Two outcomes are allowed: a one-line error with status
2, and a training that ends with finite numbers. A traceback, a longer message, another status, a result that is not
finite or a training of more than --seconds is a fault. The script prints each fault, and then has exit status 1.
Everything runs in one process, because importing torch in each process would take most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from recipes import cli
from recipes.launch import config_dir, config_groups

VALUES = [
    *("null", "true", "''", "x", "ü", "-1", "0", "1", "2.5", "1e-30", "1e30", "inf", "-inf", "nan"),
    *("99999999999999999999", "[1,2]", "{a:1}", "${x}", "???"),
]
# Arguments of Lightning's trainer for which the configuration has no key.
ADDED = [
    *("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval", "limit_val_batches", "max_steps"),
    *("min_epochs", "max_time", "strategy", "num_nodes", "num_sanity_val_steps", "gradient_clip_algorithm"),
    *("overfit_batches", "fast_dev_run", "detect_anomaly", "barebones", "benchmark", "profiler", "plugins"),
    *("reload_dataloaders_every_n_epochs", "inference_mode", "sync_batchnorm", "use_distributed_sampler"),
]
TINY = [
    *("data=tsv", "data.batch_size=8", "logger=csv", "model.dim=8", "model.num_heads=2"),
    *("model.ff_dim=16", "model.encoder_layers=1", "model.decoder_layers=1", "trainer.max_epochs=1"),
    *("trainer.accelerator=cpu", "++trainer.max_steps=9"),  # every training ends after at most nine updates
]


class TooLong(BaseException):
    """A training has taken longer than the time limit."""


def overrides() -> list[str]:
    """Every key (except paths), added argument of the trainer and config group, with every odd value."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        keys = list(_keys(compose("train", ["data=tsv", "data.path=x"])))
    keys += [f"++trainer.{name}" for name in ADDED]
    keys += [group for group in config_groups() if group != "paths"]
    return [f"{key}={value}" for key, value in itertools.product(keys, VALUES)]


def _keys(section: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in section:
        if isinstance(section._get_node(name), DictConfig):
            yield from _keys(section[name], f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("resume", "paths.output_dir", "data.path"):
            yield f"{prefix}{name}"


def outcome(override: str, folder: Path, seconds: int) -> str:
    """``refused`` or ``ran``, or else a description of the fault."""

    def stop(*_: object) -> None:
        raise TooLong

    output, errors = io.StringIO(), io.StringIO()
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    sys.argv = ["sparse-attn", "train", f"data.path={folder}", f"hydra.run.dir={run}", *TINY, override]
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    status: object = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    except TooLong:
        return f"takes more than {seconds} s"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = errors.getvalue()
    if status == 2:
        return "refused" if told.count("\n") == 1 else f"refused in {told.count(chr(10))} lines: {told[:300]}"
    if status != 0:
        return f"status {status}: {told[:200]}"
    results = run / "results.json"
    if results.exists() and not all(math.isfinite(x) for x in json.loads(results.read_text()).values()):
        return "ran, with results that are not finite"
    return "ran"


def write_data(folder: Path) -> None:
    """Writes data files of made-up words; the target of a word is the same word in capitals."""
    letters = random.Random(0)
    for split, count in {"train": 40, "val": 7, "test": 11}.items():
        words = ("".join(letters.choices("abcde", k=letters.randint(2, 7))) for _ in range(count))
        lines = "".join(f"{word}\t{' '.join(word.upper())}\n" for word in words)
        (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")


def fuzz(tried: list[str], seconds: int) -> Iterator[tuple[str, str]]:
    """Each override with its outcome."""
    with tempfile.TemporaryDirectory() as name:
        folder, place = Path(name), os.getcwd()
        write_data(folder)
        os.chdir(folder)  # so that overrides write only here
        try:
            for override in tried:
                yield override, outcome(override, folder, seconds)
        finally:
            os.chdir(place)


def main() -> None:
    """Runs the overrides and prints the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="number of overrides, drawn at random; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="use these overrides instead, such as model.dim=5")
    options = parser.parse_args()
    tried = options.overrides or overrides()
    if options.count:
        tried = random.Random(options.seed).sample(tried, min(options.count, len(tried)))
    counts: Counter[str] = Counter()
    for override, result in fuzz(tried, options.seconds):
        known = result in ("ran", "refused")
        counts[result if known else "faults"] += 1
        if not known:
            print(f"{override}: {result}", flush=True)
        if counts.total() % 100 == 0:
            print(f"{counts.total()} of {len(tried)}", file=sys.stderr, flush=True)
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("refused", "ran", "faults")), "of", counts.total())
    sys.exit(1 if counts["faults"] else 0)


if __name__ == "__main__":
    main()
