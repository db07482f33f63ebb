"""Compares our dropout with torch's, alone and in a training step: python scripts/compare_dropout.py [--rounds 20].

Both run in turn in one process, so that other load slows both equally. The script prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from recipes.seq2seq.model import Seq2SeqTransformer
from sparse_attn.kernels import dropout as module
from sparse_attn.nn import dropout as layer

# Name: width of the model, width of the feed-forward block, number of encoder layers and of decoder layers.
SIZES = {"128/256, 2+2 layers": (128, 256, 2), "256/1024, 4+4 layers": (256, 1024, 4)}


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; in every round, all calls run one after the other."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def step(dim: int, width: int, layers: int, p: float, ours: bool, dtype: torch.dtype) -> Callable[[], None]:
    """A forward and a backward of the recipe's model on 64 words of 12 tokens."""
    torch.manual_seed(0)
    model = Seq2SeqTransformer(
        40, 50, dim=dim, ff_dim=width, encoder_layers=layers, decoder_layers=layers, dropout=p
    ).train()
    source, target = torch.randint(4, 40, (64, 12)), torch.randint(4, 50, (64, 12))

    def run() -> None:
        used = module.dropout if ours else F.dropout
        layer.dropout = used  # type: ignore[attr-defined]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(source, target)
        F.cross_entropy(logits.flatten(0, 1).float(), target.flatten()).backward()

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    x = torch.randn(1600, 256)
    both = {"F.dropout": lambda: F.dropout(x, 0.1), "ours": lambda: module.dropout(x, 0.1)}
    for name, seconds in interleaved(both, rounds).items():
        print(f"{name:<10} {seconds / x.numel() * 1e9:.2f} ns per entry")
    for size, (dim, width, layers) in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            calls = {
                "no dropout": step(dim, width, layers, 0.0, True, dtype),
                "F.dropout": step(dim, width, layers, 0.1, False, dtype),
                "ours": step(dim, width, layers, 0.1, True, dtype),
            }
            found = interleaved(calls, rounds)
            shown = "  ".join(f"{name} {seconds * 1e3:7.1f} ms" for name, seconds in found.items())
            print(f"{size}, {str(dtype).removeprefix('torch.')}: {shown}")


if __name__ == "__main__":
    main()
