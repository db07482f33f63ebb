"""Compare the time of small calls in this checkout and in another checkout, alternately in one run.

    python scripts/compare_checkouts.py OTHER [ROUNDS]

OTHER is the folder of a checkout, for example a `git worktree` of the last release, with its C kernels built. Each
checkout runs in a separate process, with one thread. Times are medians over the rounds. Processor time
is measured, because other processes affect it least. A ratio above 1 means that this checkout is slower. `steps` is the
number of Python functions that a call enters.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CALLS = 50  # of each case in a round


def cases() -> dict[str, Callable[[], object]]:
    """The timed cases: calls so small that Python takes most of the time."""
    import torch

    from sparse_attn import AdaptiveSparseMultiheadAttention, entmax, entmax15, entmax_attention

    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores = torch.randn(64, 10)
    learnt = scores.clone().requires_grad_()
    query, key, value = torch.randn(3, 2, 4, 128, 16).unbind()
    wanted = [x.clone().requires_grad_() for x in (query, key, value)]
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0], requires_grad=True)
    layer, x = AdaptiveSparseMultiheadAttention(64, 4, batch_first=True), torch.randn(2, 128, 64)
    one = torch.randn(2, 1, 64)

    def training() -> None:
        entmax_attention(*wanted, alpha).sum().backward()

    def inference(query: torch.Tensor) -> None:
        with torch.no_grad():
            layer(query, x, x, need_weights=False)

    return {
        "entmax15 of 64 x 10": lambda: entmax15(scores),
        "entmax15 of 64 x 10, both passes": lambda: entmax15(learnt).sum().backward(),
        "entmax of 64 x 10, learnt α": lambda: entmax(scores, alpha[0]),
        "attention over 128 keys": lambda: entmax_attention(query, key, value),
        "attention over 128 keys, learnt α, both passes": training,
        "layer, 128 queries and keys": lambda: inference(x),
        "layer, one query": lambda: inference(one),
    }


def serve() -> None:
    """Read names of cases from standard input, and time each case that is named."""
    runs = cases()
    for run in runs.values():
        for _ in range(20):
            run()
    print(*runs, sep="\t", flush=True)
    print(*(steps(run) for run in runs.values()), sep="\t", flush=True)
    for line in sys.stdin:
        run = runs[line.rstrip("\n")]
        begin = time.process_time()
        for _ in range(_CALLS):
            run()
        print((time.process_time() - begin) / _CALLS, flush=True)


def steps(run: Callable[[], object]) -> int:
    """The number of Python functions that a call enters."""
    entered = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    run()
    sys.setprofile(None)
    return entered


def main(other: Path, rounds: int) -> None:
    """Print a line for each case: both times in µs, the median of the ratios, and the steps in both checkouts."""
    here = Path(__file__).resolve()
    start = f"import runpy; runpy.run_path({str(here)!r})['serve']()"
    folders = (here.parents[1], other.resolve())
    command = [sys.executable, "-c", start]
    servers = [subprocess.Popen(command, cwd=folder, text=True, stdin=-1, stdout=-1) for folder in folders]

    def read(server: subprocess.Popen[str]) -> list[str]:
        assert server.stdout is not None
        return server.stdout.readline().rstrip("\n").split("\t")

    def ask(server: subprocess.Popen[str], name: str) -> float:
        assert server.stdin is not None
        print(name, file=server.stdin, flush=True)
        return float(read(server)[0])

    names, _ = [read(server) for server in servers]
    counts = zip(*(read(server) for server in servers), strict=True)
    print(f"{'µs':46}{'this':>9}{'other':>9}{'ratio':>8}   steps")
    for name, (ours, theirs) in zip(names, counts, strict=True):
        times = [[ask(server, name) for server in servers] for _ in range(rounds)]
        this, that = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        print(f"{name:46}{this:9.1f}{that:9.1f}{ratio:8.3f}   {ours} and {theirs}", flush=True)
    for server in servers:
        server.terminate()


if __name__ == "__main__":
    folder, rounds = (*sys.argv[1:], "30")[:2] if 2 <= len(sys.argv) <= 3 else sys.exit(__doc__)
    if not (Path(folder) / "sparse_attn").is_dir():
        sys.exit(f"OTHER must be the folder of a checkout of sparse-attn, got {folder}")
    if not rounds.isdecimal() or int(rounds) < 1:
        sys.exit(f"ROUNDS must be an int of at least 1, got {rounds}")
    main(Path(folder), int(rounds))
