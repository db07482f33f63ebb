"""Compare the time of operators, losses, attention and layers with the times of torch and the entmax package.

OMP_WAIT_POLICY=passive python scripts/benchmark.py [ROUNDS] [--write] [--threads N ...] [--only SECTION ...]

All functions run in turn in one process. Prints times divided by the times of torch's functions, as forward / forward +
backward. All sections run on one thread; attention, padding and decoding also run on two threads. ``--write`` also
writes the tables to benchmarks/cpu.md. Takes about ten minutes with the default of 15 rounds on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import entmax as peer
import torch
from benchmark_timing import Run, both_passes, heading, interleave, on_backend, processor, ratio, row, spread_line
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.seq2seq.attention import ATTENTION_KINDS
from recipes.seq2seq.model import Seq2SeqTransformer
from sparse_attn import (
    backends,
    entmax,
    entmax15,
    entmax15_loss,
    entmax_attention,
    entmax_attention_varlen,
    entmax_loss,
    replace_attention,
    sparsemax,
    sparsemax_loss,
    topk_attention,
    topk_softmax,
)

ELEMENTS = 2**19
HEADS = 8
PAGE = Path(__file__).parents[1] / "benchmarks" / "cpu.md"


def main(rounds: int, write: bool, threads: list[int], only: list[str]) -> None:
    """Measure and print all chosen sections on ``threads[0]`` threads, and those in _THREADED on each other number."""
    lines = []
    for number in threads:
        torch.set_num_threads(number)
        torch.manual_seed(0)
        first = number == threads[0]
        chosen = [name for name in only or SECTIONS if first or name in _THREADED]
        begin = header if first else _more_threads
        for section in (begin, *(SECTIONS[name] for name in chosen)):
            for line in (*section(rounds), *spread_line()):
                print(line, flush=True)
                lines.append(line)
    if write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def header(rounds: int) -> Iterator[str]:
    """The header of the page: machine, versions and method."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "entmax", "sparse-attn"))
    yield "# Speed and memory on a CPU"
    yield ""
    yield f"Made by `OMP_WAIT_POLICY=passive python scripts/benchmark.py {rounds} --write` on {date.today()}."
    yield f"{processor()}, threads: {torch.get_num_threads()}; Python {platform.python_version()}, {versions}."
    yield f"Kernels: {backends()['compiled']}."
    yield "Except for memory, a number is a time divided by the time of the same computation with torch's softmax in"
    yield "the same run (for losses: of cross-entropy); below 1 is faster. a / b: a is for forward, b for forward +"
    yield "backward. A single number is for the pass that the column names, or else for forward. A time is the smallest"
    clock = "processor time of the thread" if torch.get_num_threads() == 1 else "wall-clock time"
    yield f"of {rounds} rounds, in {clock}. In each round, all functions run in turn, for 2 ms or at least one call."
    yield "`torch` marks plain torch, which is used where there are no C kernels. k: the entmax package first"
    yield "sorts only the k largest scores. `explicit` marks attention written as two matrix products and a mapping."


def _more_threads(rounds: int) -> Iterator[str]:
    yield ""
    yield f"The sections below ran on {torch.get_num_threads()} threads. Their times are wall-clock times."


def operators(rounds: int) -> Iterator[str]:
    """Operators on scores (N, 8, d) of scale 1; a learnt α has one value for each of the 8 heads."""
    sizes = (64, 128, 512, 2048, 32000)
    yield from heading(f"Operators, {ELEMENTS} scores of scale 1 in rows of d", [f"d {d}" for d in sizes])
    columns = [_operators(d, rounds) for d in sizes]
    for name in list(columns[0])[1:]:
        yield row(name, [ratio(column[name], column["softmax"]) for column in columns])


def _operators(d: int, rounds: int) -> dict[str, list[float]]:
    x = torch.randn(max(1, ELEMENTS // (HEADS * d)), HEADS, d, requires_grad=True)
    upstream = torch.randn_like(x)
    alpha = torch.linspace(1.1, 1.9, HEADS).view(HEADS, 1).requires_grad_()
    expanded = alpha.expand(len(x), HEADS, 1)
    maps: dict[str, tuple[Callable[[], Tensor], str]] = {
        "softmax": (lambda: torch.softmax(x, -1), ""),
        "sparsemax": (lambda: sparsemax(x), ""),
        "sparsemax, torch": (lambda: sparsemax(x), "torch"),
        "sparsemax, entmax package": (lambda: peer.sparsemax(x, -1), ""),
        "sparsemax, entmax package, k=32": (lambda: peer.sparsemax(x, -1, k=32), ""),
        "1.5-entmax": (lambda: entmax15(x), ""),
        "1.5-entmax, torch": (lambda: entmax15(x), "torch"),
        "1.5-entmax, entmax package": (lambda: peer.entmax15(x, -1), ""),
        "1.5-entmax, entmax package, k=32": (lambda: peer.entmax15(x, -1, k=32), ""),
        "α per head and its gradient": (lambda: entmax(x, alpha), ""),
        "α per head and its gradient, torch": (lambda: entmax(x, alpha), "torch"),
        "α per head and its gradient, entmax package": (lambda: peer.entmax_bisect(x, expanded), ""),
        "top-8 softmax": (lambda: topk_softmax(x, 8), ""),
        "top-8 softmax, torch": (lambda: topk_softmax(x, 8), "torch"),
    }
    return both_passes({name: on_backend(backend, make) for name, (make, backend) in maps.items()}, upstream, rounds)


def losses(rounds: int) -> Iterator[str]:
    """Losses of 64 rows with a vocabulary of 32,000."""
    yield from heading("Losses, logits (64, 32000)", ["multiples of cross-entropy"])
    x, target = torch.randn(64, 32000, requires_grad=True), torch.randint(32000, (64,))
    alpha = torch.tensor(1.5, requires_grad=True)
    makes: dict[str, Run] = {
        "cross-entropy": lambda: F.cross_entropy(x, target),
        "sparsemax_loss": lambda: sparsemax_loss(x, target),
        "entmax15_loss": lambda: entmax15_loss(x, target),
        "entmax_loss, α learnt": lambda: entmax_loss(x, target, alpha),
        "SparsemaxLoss, entmax package, k=512": lambda: peer.SparsemaxLoss(k=512)(x, target),
        "Entmax15Loss, entmax package, k=512": lambda: peer.Entmax15Loss(k=512)(x, target),
        "EntmaxBisectLoss, entmax package": lambda: peer.EntmaxBisectLoss(1.5)(x, target),
    }
    times = both_passes(makes, None, max(3, rounds // 3))
    for name in list(times)[1:]:
        yield row(name, [ratio(times[name], times["cross-entropy"])])


_LENGTHS = (32, 128, 512, 2048, 8192)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attention(rounds: int) -> Iterator[str]:
    """Attention with one head, compared with torch's function; causal attention with torch's causal attention."""
    for name, dtype in _DTYPES.items():
        columns = [_attention(n, 64, dtype, _fewer(rounds, n)) for n in _LENGTHS]
        yield from _against_sdpa(f"Attention in {name}, one head of size 64", columns)


def head_sizes(rounds: int) -> Iterator[str]:
    """Attention with one head of size 32 or 128, for the main functions."""
    for name, dtype in _DTYPES.items():
        for size in (32, 128):
            columns = [_attention(n, size, dtype, _fewer(rounds, n), only=_MAIN) for n in _LENGTHS]
            yield from _against_sdpa(f"Attention in {name}, one head of size {size}", columns)


_MAIN = (
    "softmax",
    "softmax, causal",
    "entmax_attention, α = 1.5",
    "entmax_attention, α = 1.5, causal",
    "entmax_attention, α learnt, at 1.25",
    "topk_attention, k = 8",
)


def _fewer(rounds: int, n: int) -> int:
    return max(3, rounds // (1 + n // 1024))


def _against_sdpa(title: str, columns: list[dict[str, list[float]]]) -> Iterator[str]:
    yield from heading(f"{title}, multiples of scaled_dot_product_attention", [f"N {n}" for n in _LENGTHS])
    for name in list(columns[0])[2:]:
        base = "softmax, causal" if "causal" in name else "softmax"
        yield row(name, [ratio(column[name], column[base]) if name in column else "" for column in columns])


def _attention(
    n: int, size: int, dtype: torch.dtype, rounds: int, only: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    query, key, value = (torch.randn(1, 1, n, size).to(dtype).requires_grad_() for _ in range(3))
    alpha = torch.tensor([1.5], requires_grad=True)
    gentle = torch.tensor([1.25], requires_grad=True)

    def explicit(mapping: Callable[[Tensor], Tensor]) -> Tensor:
        return mapping(query @ key.transpose(-2, -1) / math.sqrt(size)) @ value

    makes: dict[str, Run] = {
        "softmax": lambda: F.scaled_dot_product_attention(query, key, value),
        "softmax, causal": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "entmax_attention, α = 1.5": lambda: entmax_attention(query, key, value),
        "entmax_attention, α = 1.5, causal": lambda: entmax_attention(query, key, value, is_causal=True),
        "entmax_attention, α = 2": lambda: entmax_attention(query, key, value, 2.0),
        "entmax_attention, α learnt, at 1.5": lambda: entmax_attention(query, key, value, alpha),
        "entmax_attention, α learnt, at 1.25": lambda: entmax_attention(query, key, value, gentle),
        "topk_attention, k = 8": lambda: topk_attention(query, key, value, 8),
    }
    if n <= 2048 and dtype == torch.float32:
        makes["explicit softmax"] = lambda: explicit(partial(torch.softmax, dim=-1))
        makes["entmax_attention, α = 1.5, torch"] = on_backend("torch", lambda: entmax_attention(query, key, value))
        makes["explicit, entmax package, k=32"] = lambda: explicit(partial(peer.entmax15, dim=-1, k=32))
    makes = {name: make for name, make in makes.items() if not only or name in only}
    return both_passes(makes, torch.randn(1, 1, n, size).to(dtype), rounds)


def padding(rounds: int) -> Iterator[str]:
    """Attention of a batch of different lengths, padded with a boolean mask, and packed without padding."""
    columns = [_padding(dtype, max(3, rounds // 2)) for dtype in _DTYPES.values()]
    title = "Padding: lengths 512, 130, 257 and 300, 8 heads of size 64, multiples of scaled_dot_product_attention"
    yield from heading(title, list(_DTYPES))
    for name in list(columns[0])[1:]:
        yield row(name, [ratio(column[name], column["softmax"]) for column in columns])


def _padding(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    lengths = (512, 130, 257, 300)
    query, key, value = (torch.randn(4, 8, 512, 64).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.arange(512) < torch.tensor(lengths).view(4, 1, 1, 1)
    packed = [torch.randn(sum(lengths), 8, 64).to(dtype).requires_grad_() for _ in range(3)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    makes: dict[str, Run] = {
        "softmax": lambda: F.scaled_dot_product_attention(query, key, value, mask),
        "entmax_attention, α = 1.5": lambda: entmax_attention(query, key, value, attn_mask=mask),
        "entmax_attention_varlen, α = 1.5": lambda: entmax_attention_varlen(*packed, starts, starts),
    }
    times = interleave({**makes, **{(name,): _backward(make) for name, make in makes.items()}}, rounds)
    return {name: [times[name], times[(name,)]] for name in makes}


def _backward(make: Run) -> Run:
    return lambda: make().sum().backward()  # type: ignore[attr-defined]


def decoding(rounds: int) -> Iterator[str]:
    """Attention of one query per head to a long cache, with 8 heads."""
    sizes = (4096, 16384, 65536)
    for title, dtype in _DTYPES.items():
        columns = [_decoding(size, dtype, rounds) for size in sizes]
        title = f"Decoding in {title}: one query, 8 heads of size 64, multiples of scaled_dot_product_attention"
        yield from heading(title, [f"{size} keys" for size in sizes])
        for name in list(columns[0])[1:]:
            yield row(name, [f"{column[name] / column['softmax']:.2f}" for column in columns])


def _decoding(size: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    query = torch.randn(1, 8, 1, 64).to(dtype)
    key, value = (torch.randn(1, 8, size, 64).to(dtype) for _ in range(2))
    runs: dict[str, Run] = {
        "softmax": lambda: F.scaled_dot_product_attention(query, key, value),
        "entmax_attention, α = 1.5": lambda: entmax_attention(query, key, value),
        "entmax_attention, α = 1.25": lambda: entmax_attention(query, key, value, 1.25),
        "topk_attention, k = 8": lambda: topk_attention(query, key, value, 8),
    }
    return interleave(runs, rounds)


def memory(rounds: int) -> Iterator[str]:
    """Peak memory of forward and backward with (1, 8, 4096, 64), each function in a separate process; only on Linux."""
    if sys.platform != "linux":
        return
    title = "Peak memory in addition to the inputs, N 4096, 8 heads of size 64, forward + backward"
    yield from heading(title, ["MiB"])
    for name in MEMORY:
        done = subprocess.run([sys.executable, __file__, "--peak", name], check=True, capture_output=True, text=True)
        yield row(name, [done.stdout.strip()])


MEMORY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entmax_attention, α = 1.5": entmax_attention,
    "entmax_attention, α learnt": lambda q, k, v: entmax_attention(q, k, v, torch.full((8,), 1.5, requires_grad=True)),
    "topk_attention, k = 32": lambda q, k, v: topk_attention(q, k, v, 32),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "explicit softmax": lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / 8, -1) @ v,
    "explicit, entmax package, k=32": lambda q, k, v: peer.entmax15(q @ k.transpose(-2, -1) / 8, -1, k=32) @ v,
}


def peak(name: str) -> None:
    """Print the largest increase of the resident memory of this process during a call, in MiB."""
    torch.set_num_threads(1)
    for n in (64, 4096):  # a small length first, so that one-time allocations are not counted
        inputs = [torch.randn(1, 8, n, 64, requires_grad=True) for _ in range(3)]
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have raised
        before = _resident("VmRSS")
        MEMORY[name](*inputs).sum().backward()
    print(f"{(_resident('VmHWM') - before) / 1024:.0f}")


def _resident(field: str) -> int:
    """The value of a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def layers(rounds: int) -> Iterator[str]:
    """A training step of an encoder layer, and a training step of the recipes' default model."""
    yield from heading("A training step, multiples of softmax", ["forward + backward"])
    x = torch.randn(8, 256, 512)
    dense = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    swapped = {}
    for name, options in {"α learnt": {}, "α = 1.5, fixed": {"learn_alpha": False}}.items():
        swapped[name] = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        replace_attention(swapped[name], **options)
    steps: dict[str, Run] = {"dense": lambda: dense(x).sum().backward()}
    for name, layer in swapped.items():
        steps[name] = lambda layer=layer: layer(x).sum().backward()
    times = interleave(steps, max(3, rounds // 3))
    for name in swapped:
        label = f"nn.TransformerEncoderLayer (size 512, feed-forward 2048, 8 heads, N 256, batch 8), {name}"
        yield row(label, [f"{times[name] / times['dense']:.2f}"])
    source, target = torch.randint(4, 30, (64, 9)), torch.randint(4, 40, (64, 9))
    steps = {}
    for kind in ATTENTION_KINDS:
        model = Seq2SeqTransformer(
            30, 40, ff_dim=256, encoder_attention=kind, decoder_attention=kind, cross_attention=kind
        )
        steps[kind] = lambda model=model: F.cross_entropy(
            model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
        ).backward()
    times = interleave(steps, rounds)
    for kind in list(ATTENTION_KINDS)[1:]:
        label = f"default model of the recipes on 64 words of nine letters, {kind}"
        yield row(label, [f"{times[kind] / times['softmax']:.2f}"])


SECTIONS = {
    section.__name__: section
    for section in (operators, losses, attention, head_sizes, padding, decoding, memory, layers)
}
_THREADED = ("attention", "padding", "decoding")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=15)
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/cpu.md")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads; above 1, wall-clock times are compared"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="sections to measure")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak(arguments.peak)
    else:
        main(arguments.rounds, arguments.write, arguments.threads, arguments.only)
