"""Measure the errors of the mappings and of their gradients, for this library and for the entmax package.

OMP_WAIT_POLICY=passive python scripts/measure_accuracy.py [--write]

Prints the page; ``--write`` also writes ``benchmarks/accuracy.md``. Takes half a minute, and gives the same numbers
every time on the same machine.
"""

from __future__ import annotations

import itertools
import math
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import entmax as peer
import torch
from torch import Tensor

from sparse_attn import budget_sparsemax, entmax, entmax15, normmax, sparsemax

PAGE = Path(__file__).parents[1] / "benchmarks" / "accuracy.md"
SIZES = {2: 64, 7: 64, 128: 16, 1024: 4, 32768: 1}  # size of a row -> number of rows
SCALES = (0.01, 1.0, 10.0, 100.0)
ALPHAS = (1.0, 1.0001, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0)
GRADIENT_ALPHAS = (1.0, 1.0001, 1.001, 1.01, 1.1, 1.5, 1.75, 1.9, 2.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Mapping = Callable[[Tensor], Tensor]


def main(arguments: list[str]) -> None:
    """Measure, print, and with ``--write`` also write the page."""
    if set(arguments) - {"--write"}:
        sys.exit(f"usage: measure_accuracy.py [--write], got {' '.join(arguments)}")
    torch.set_num_threads(1)
    worse: list[str] = []
    parts = [
        heading(),
        probabilities(worse),
        other_mappings(worse),
        gradients(worse),
        half_gradients(worse),
        hard_inputs(),
        where_worse(worse),
    ]
    page = "\n\n".join(parts) + "\n"
    print(page, end="")
    if arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")


def heading() -> str:
    """The versions and the machine of the measurement."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, entmax {version('entmax')}"
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    return f"""# Accuracy

Made by `python scripts/measure_accuracy.py --write`. Every run on the same machine gives the same numbers. Versions:
{versions}, CPU ({platform.machine()}), one thread.

Rows have {", ".join(map(str, SIZES))} scores, normally distributed with standard deviation {scales}; every number
is the maximum over all rows. Exact values are computed by bisection in float64, from the scores and the α after
rounding to the dtype in which the mapping receives them. Errors are computed without the rows that contain a NaN;
(n NaN) gives the number of these rows.
"Peer" is the entmax package: `entmax_bisect`, and for α = 1.5 and 2 also its exact `entmax15` and `sparsemax`."""


def ordinary_rows(dtype: torch.dtype) -> Iterator[Tensor]:
    """Scores (n, d) of every size and scale."""
    torch.manual_seed(0)
    for (size, count), scale in itertools.product(SIZES.items(), SCALES):
        yield (torch.randn(count, size) * scale).to(dtype)


# The exact values, by bisection, without code of this library.


def bisect(total: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The root of the decreasing function ``total``; all tensors are (..., 1)."""
    for _ in range(80):
        middle = (low + high) / 2
        above = total(middle) >= 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low


def exact_entmax(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``p = [1 + a (z - σ)]_+^(1/a)`` with ``a = α - 1`` and ``z = x - max x``, and ``z - σ``."""
    z, a = x.double() - x.double().amax(-1, keepdim=True), alpha - 1
    if a == 0:
        return torch.softmax(z, -1), torch.log_softmax(z, -1)

    def p(sigma: Tensor) -> Tensor:
        return torch.exp(torch.log1p((a * (z - sigma)).clamp(min=-1)) / a)

    low = torch.zeros_like(z[..., :1])
    # a row of equal scores has the largest σ
    sigma = bisect(lambda s: p(s).sum(-1, keepdim=True) - 1, low, low - math.expm1(-a * math.log(z.shape[-1])) / a)
    return p(sigma) / p(sigma).sum(-1, keepdim=True), z - sigma


def exact_gradients(x: Tensor, alpha: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for the scores and for α per row, where ``log p = log1p(a v) / a``, ``v = z - σ`` and ``Σ dp = 0``."""
    p, v = exact_entmax(x, alpha)
    a, inside = alpha - 1, p > 0
    v = torch.where(inside, v, 0.0)
    u = p / (1 + a * v)
    # Relative to the gradient of the largest entry: otherwise even float64 would lose the digits of a one-hot row.
    upstream = upstream.double() - upstream.double().gather(-1, p.argmax(-1, keepdim=True))
    centred = upstream - (u * upstream).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)
    slope = -(v**2) / 2 if a == 0 else (v / (1 + a * v) - torch.log1p(a * v) / a) / a
    return u * centred, (p * slope * centred).sum(-1, keepdim=True)


def exact_normmax(x: Tensor, alpha: float) -> Tensor:
    """``q = [z - τ]_+^(1/(α-1))`` divided by its sum, where τ makes ``Σ q^α = 1``; ``z = x - max x``."""
    z = x.double() - x.double().amax(-1, keepdim=True)

    def q(tau: Tensor) -> Tensor:
        return (z - tau).clamp(min=0) ** (1 / (alpha - 1))

    low = torch.full_like(z[..., :1], -1.0)
    tau = bisect(lambda t: (q(t) ** alpha).sum(-1, keepdim=True) - 1, low, torch.zeros_like(low))
    return q(tau) / q(tau).sum(-1, keepdim=True)


def exact_budget(x: Tensor, budget: float) -> Tensor:
    """``p = clip(z - τ, 0, 1)``, where τ makes ``Σ p`` equal to the budget; ``z = x - max x``."""
    z = x.double() - x.double().amax(-1, keepdim=True)
    low = z.amin(-1, keepdim=True) - 1
    tau = bisect(lambda t: (z - t).clamp(0, 1).sum(-1, keepdim=True) - budget, low, torch.zeros_like(low))
    return (z - tau).clamp(0, 1)


# The tables.


class Worst:
    """The largest error of a mapping, the largest error of its sums, and the number of rows with NaN."""

    def __init__(self) -> None:
        self.error = self.sum = 0.0
        self.nan = 0

    def add(self, p: Tensor, exact: Tensor) -> None:
        """Compare the rows of a result with the exact rows."""
        fine = p.isfinite().all(-1)
        self.nan += int((~fine).sum())
        if fine.any():
            error, off = (p.double() - exact)[fine].abs(), (p.double() - exact)[fine].sum(-1).abs()
            self.error, self.sum = max(self.error, float(error.max())), max(self.sum, float(off.max()))

    def show(self, value: float) -> str:
        """A cell of a table."""
        return f"{value:.1e}" + (f" ({self.nan} NaN)" if self.nan else "")


def measured(mapping: Mapping, rows: list[Tensor], exact: list[Tensor]) -> Worst:
    """The errors of a mapping over all rows."""
    worst = Worst()
    for x, wanted in zip(rows, exact, strict=True):
        worst.add(mapping(x.clone()), wanted)
    return worst


def compare(worse: list[str], where: str, ours: float, others: dict[str, tuple[float, int]]) -> None:
    """Append a line to ``worse`` if the peer is more exact."""
    for name, (error, nan) in others.items():
        if not nan and error < ours:
            worse.append(f"{where}: {ours:.1e}, `{name}` {error:.1e}")


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def table(head: str, lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *(f"| {' | '.join(x)} |" for x in lines)])


def probabilities(worse: list[str]) -> str:
    """Errors of our probabilities, of the peer's bisection and of its exact mappings."""
    parts = [
        """## Probabilities

The tables show the largest absolute error, and the largest |Σp - 1|. In half precision, rounding the exact value
already causes an error of up to 2.0e-03 (bfloat16) and 2.4e-04 (float16). The peer rounds α to the dtype of the scores
(1.001 is 1 in bfloat16); it is compared with the exact mapping for the rounded α."""
    ]
    for dtype in DTYPES:
        rows, lines = list(ordinary_rows(dtype)), []
        for alpha in ALPHAS:
            exact = [exact_entmax(x, alpha)[0] for x in rows]
            rounded = float(torch.tensor(alpha, dtype=dtype))
            exact_rounded = exact if rounded == alpha else [exact_entmax(x, rounded)[0] for x in rows]
            ours = measured(lambda x, alpha=alpha: entmax(x, alpha), rows, exact)
            theirs = {
                "entmax_bisect": measured(lambda x, alpha=alpha: peer.entmax_bisect(x, alpha), rows, exact_rounded)
            }
            if alpha in (1.5, 2.0):
                closed = {1.5: peer.entmax15, 2.0: peer.sparsemax}[alpha]
                theirs[closed.__name__] = measured(lambda x, closed=closed: closed(x, -1), rows, exact)
            compare(
                worse,
                f"{name_of(dtype)}, α = {alpha:g}",
                ours.error,
                {name: (worst.error, worst.nan) for name, worst in theirs.items()},
            )
            shown = [ours, *theirs.values()]
            gap = ["-"] * (3 - len(shown))
            lines.append([f"{alpha:g}", *(w.show(w.error) for w in shown), *gap, *(w.show(w.sum) for w in shown), *gap])
        head = "α | error: ours | peer, bisection | peer, exact | sum: ours | peer, bisection | peer, exact"
        parts.append(f"### {name_of(dtype)}\n\n" + table(head, lines))
    return "\n\n".join(parts)


def other_mappings(worse: list[str]) -> str:
    """Errors of normmax and budget sparsemax, compared with ``normmax_bisect`` and ``budget_bisect``."""
    lines = []
    for dtype in DTYPES:
        rows = [x for x in ordinary_rows(dtype) if x.shape[-1] > 2]
        for name, value, ours, theirs, right in (
            *(("normmax α", a, normmax, peer.normmax_bisect, exact_normmax) for a in (1.1, 1.5, 2.0, 3.0)),
            *(("budget", b, budget_sparsemax, peer.budget_bisect, exact_budget) for b in (1.0, 2.0, 5.5)),
        ):
            exact = [right(x, value) for x in rows]
            # The peer rounds the exponent to the dtype of the scores.
            rounded = float(torch.tensor(value, dtype=dtype)) if theirs is peer.normmax_bisect else value
            exact_rounded = exact if rounded == value else [right(x, rounded) for x in rows]
            one = measured(lambda x, f=ours, value=value: f(x, value), rows, exact)
            two = measured(lambda x, f=theirs, value=value: f(x, value), rows, exact_rounded)
            where = f"{name_of(dtype)}, {name} {value:g}"
            compare(worse, where, one.error, {theirs.__name__: (two.error, two.nan)})
            lines.append([where, *(w.show(w.error) for w in (one, two)), *(w.show(w.sum) for w in (one, two))])
    text = "## Normmax and budget\n\nAs above, for rows of at least 7 scores. "
    text += "The sum of budget probabilities is compared with the budget instead of 1.\n\n"
    return text + table("map | error: ours | peer | sum: ours | peer", lines)


def gradients(worse: list[str]) -> str:
    """Errors of the gradients for the scores and for α, in float32."""
    lines = []
    for alpha in GRADIENT_ALPHAS:
        alpha = float(torch.tensor(alpha))
        errors: dict[tuple[str, int], list[float]] = {}
        nan = {"ours": 0, "peer": 0}
        for x in ordinary_rows(torch.float32):
            upstream = torch.randn_like(x)
            exact = exact_gradients(x, alpha, upstream)
            if min(float(grad.abs().max()) for grad in exact) < 1e-20:
                continue
            for who, mapping in (("ours", entmax), ("peer", peer.entmax_bisect)):
                got = gradients_of(mapping, x, torch.full((len(x), 1), alpha), upstream)
                nan[who] += int((~got[1].isfinite()).sum())
                for i in range(2):
                    errors.setdefault((who, i), []).append(relative(got[i], exact[i]))
        cells = []
        for i, what in enumerate(("scores", "α")):
            one, two = max(errors["ours", i]), max(errors["peer", i])
            compare(worse, f"gradient for {what} at α = {alpha:.6g}", one, {"entmax_bisect": (two, nan["peer"])})
            cells += [f"{one:.1e}", "NaN" if math.isnan(two) else f"{two:.1e}"]
        lines.append([f"{alpha:.6g}", *cells])
    text = """## Gradients in float32

Upstream gradients are normally distributed; α is one number per row, in float32. For each size and scale, the largest
error is divided by the largest exact value; the table has the maximum of these ratios. Near α = 1, this maximum
comes from a batch of nearly one-hot rows with gradients close to zero. A batch is left out if its gradients for the
scores, or for α, are all below 1e-20.

"""
    return text + table("α | scores: ours | peer | α: ours | peer", lines)


def half_gradients(worse: list[str]) -> str:
    """Errors of the gradient for α, with scores and upstream gradients in bfloat16."""
    lines = []
    for alpha in GRADIENT_ALPHAS:
        cells = []
        for mapping, dtype in ((entmax, torch.float32), (peer.entmax_bisect, torch.bfloat16)):
            given = torch.tensor(alpha, dtype=dtype)
            torch.manual_seed(1)
            wrong = total = 0
            largest = 0.0
            for size in (7, 128, 1024):
                x, upstream = torch.randn(80, size).bfloat16(), torch.randn(80, size).bfloat16()
                edge = 1 + (float(given) - 1) * exact_entmax(x, float(given))[1]
                fine = edge.abs().amin(-1) > 1e-6
                x, upstream = x[fine][:64], upstream[fine][:64]
                exact = exact_gradients(x, float(given), upstream)[1]
                got = gradients_of(mapping, x, given.expand(64, 1), upstream)[1]
                wrong, total = wrong + int((got.sign() != exact.sign()).sum()), total + len(got)
                largest = max(largest, relative(got, exact)) if got.isfinite().all() else math.nan
            cells += [f"{wrong} of {total}", "NaN" if math.isnan(largest) else f"{largest:.1e}"]
        lines.append([f"{alpha:g}", *cells])
    text = """## Gradient for α in bfloat16

Scores with standard deviation 1 and upstream gradients are in bfloat16. Our mapping takes α in float32, the dtype of α
in the layers; the peer takes α in bfloat16, and is compared with the exact gradient at the rounded α. The table has the
number of rows with a wrong sign, and the largest error divided by the largest exact value. Rows with an entry exactly
on the edge of the support, which are frequent in bfloat16, are left out: at α = 2 the gradient is discontinuous there.

"""
    return text + table("α | wrong sign: ours | error | wrong sign: peer | error", lines)


def gradients_of(mapping: Callable[..., Tensor], x: Tensor, alpha: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a mapping for the scores and for α."""
    scores, alpha = x.detach().clone().requires_grad_(), alpha.detach().clone().requires_grad_()
    grads = torch.autograd.grad(mapping(scores, alpha), (scores, alpha), upstream)
    return grads[0].double(), grads[1].double()


def relative(got: Tensor, exact: Tensor) -> float:
    """The largest error divided by the largest exact value; NaN if a value is NaN."""
    return float((got - exact).abs().max() / exact.abs().max())


def hard_inputs() -> str:
    """Errors for rows that are hard to compute: masked entries, scores far from 0."""
    inf, low = math.inf, torch.finfo(torch.float32).min
    torch.manual_seed(2)
    random = torch.randn(8, 128)
    half = random.masked_fill(torch.rand(8, 128) < 0.5, -inf)
    inputs = {
        "every entry -inf": torch.full((8, 128), -inf),
        "every entry the smallest finite number": torch.full((8, 128), low),
        "half the entries -inf": half,
        "half the entries the smallest finite number": half.clamp(min=low),
        "scores about 1e5": random + 1e5,
        "scores about 3e7": random.round() * 4 + 3e7,
        "float16, scores about 4096": (random * 8 + 4096).half(),
        "bfloat16, scores about 300": (random * 8 + 300).bfloat16(),
    }
    maps: dict[str, tuple[Mapping, Mapping, Callable[[Tensor], Tensor]]] = {
        "sparsemax": (sparsemax, lambda x: peer.sparsemax(x, -1), lambda x: exact_entmax(x, 2.0)[0]),
        "entmax15": (entmax15, lambda x: peer.entmax15(x, -1), lambda x: exact_entmax(x, 1.5)[0]),
        "α = 1.5, peer by bisection": (lambda x: entmax(x, 1.5), peer.entmax_bisect, lambda x: exact_entmax(x, 1.5)[0]),
        "normmax": (normmax, peer.normmax_bisect, lambda x: exact_normmax(x, 2.0)),
        "budget": (budget_sparsemax, peer.budget_bisect, lambda x: exact_budget(x, 2.0)),
    }
    lines = []
    for name, x in inputs.items():
        # The exact mappings get a score far below all others in place of a masked score.
        far = x.double().masked_fill(x <= torch.finfo(x.dtype).min, -1e4)
        cells = []
        for ours, theirs, right in maps.values():
            exact = right(far) if (far > -1e4).any() else torch.zeros_like(far)
            cells += [outcome(ours, x, exact), outcome(theirs, x, exact)]
        lines.append([name, *cells])
    text = "## Hard inputs\n\nThe largest error in eight rows of 128 scores, or the number of rows with NaN, "
    text += "or the exception: ours / peer.\n\n"
    pairs = [[line[0], *(f"{a} / {b}" for a, b in zip(line[1::2], line[2::2], strict=True))] for line in lines]
    return text + table(" | ".join(["scores", *maps]), pairs)


def outcome(mapping: Mapping, x: Tensor, exact: Tensor) -> str:
    """The error, or the number of rows with NaN, or the exception."""
    try:
        p = mapping(x.clone())
    except Exception as error:
        return type(error).__name__
    nan = int((~p.isfinite()).any(-1).sum())
    return f"{nan} NaN" if nan else f"{float((p.double() - exact).abs().max()):.0e}"


def where_worse(worse: list[str]) -> str:
    """Where the peer is more exact than we are."""
    text = "## Where the peer is more exact\n\n"
    return text + ("\n".join(f"- {line}" for line in worse) if worse else "Nowhere in these tables.")


if __name__ == "__main__":
    main(sys.argv[1:])
