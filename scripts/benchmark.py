"""Time the operators and a training step beside softmax and the entmax package, interleaved in one run.

OMP_WAIT_POLICY=passive python scripts/benchmark.py [ROUNDS]

Prints multiples of ``torch.softmax`` (forward / forward + backward; one thread, medians), then of
a softmax training step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import entmax as peer
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.seq2seq.attention import ATTENTION_KINDS
from recipes.seq2seq.model import Seq2SeqTransformer
from sparse_attn import entmax, entmax15, sparsemax, topk_softmax

ELEMENTS = 2**18
HEADS = 8


def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    operators(rounds)
    training_step(rounds)


def operators(rounds: int) -> None:
    """Scores (N, 8, L, d) of scale 1, 2^18 of them, one α per head where α is learnt."""
    sizes = (16, 128, 512, 2048)
    print("multiples of torch.softmax, forward / forward + backward")
    print("| | " + " | ".join(f"d {d}" for d in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    columns = [_column(d, rounds) for d in sizes]
    for name in list(columns[0])[1:]:
        cells = [f"{c[name][0] / c['softmax'][0]:.1f} / {c[name][1] / c['softmax'][1]:.1f}" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _column(d: int, rounds: int) -> dict[str, tuple[float, float]]:
    x = torch.randn(max(1, ELEMENTS // (HEADS * 16 * d)), HEADS, 16, d, requires_grad=True)
    upstream = torch.randn_like(x)
    alpha = torch.linspace(1.1, 1.9, HEADS).view(HEADS, 1, 1).requires_grad_()
    maps: dict[str, Callable[[], Tensor]] = {
        "softmax": lambda: torch.softmax(x, -1),
        "sparsemax": lambda: sparsemax(x),
        "sparsemax, entmax package": lambda: peer.sparsemax(x, -1),
        "1.5-entmax": lambda: entmax15(x),
        "1.5-entmax, entmax package": lambda: peer.entmax15(x, -1),
        "α per head and its gradient": lambda: entmax(x, alpha),
        "α per head and its gradient, entmax package": lambda: peer.entmax_bisect(x, alpha.expand(len(x), -1, 16, 1)),
        "top-8 softmax": lambda: topk_softmax(x, 8),
    }
    runs: dict[str, list[Callable[[], object]]] = {
        name: [make, lambda make=make: make().backward(upstream)] for name, make in maps.items()
    }
    times = _interleave({(name, kind): run for name, both in runs.items() for kind, run in enumerate(both)}, rounds)
    return {name: (times[name, 0], times[name, 1]) for name in maps}


def training_step(rounds: int) -> None:
    """One step of the default model (two layers each of 128) on 64 words of 9 letters."""
    source, target = torch.randint(4, 30, (64, 9)), torch.randint(4, 40, (64, 9))
    steps = {}
    for kind in ATTENTION_KINDS:
        model = Seq2SeqTransformer(
            30, 40, ff_dim=256, encoder_attention=kind, decoder_attention=kind, cross_attention=kind
        )
        steps[kind] = lambda model=model: F.cross_entropy(
            model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
        ).backward()
    times = _interleave(steps, rounds)
    print("\nmultiples of a softmax training step (forward and backward of the default model)")
    print("| " + " | ".join(ATTENTION_KINDS) + " |")
    print("|---" * len(ATTENTION_KINDS) + "|")
    print("| " + " | ".join(f"{times[kind] / times['softmax']:.2f}" for kind in ATTENTION_KINDS) + " |")


def _interleave(runs: dict, rounds: int) -> dict:
    """Median seconds of each, taken in turn so that a busy neighbour meets all alike."""
    taken: dict = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.thread_time()
            run()
            if turn:  # the first round warms up
                taken[name].append(time.thread_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
