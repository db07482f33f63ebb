"""DDP and FSDP2 over gloo on the CPU: the steps of two processes equal those of one process with the joined batch.

α and the checkpoints of sharded models are tested, too.
The tests run this file as a program, once for each process, and read the results that both processes write to a folder.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from old_torch import since_torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from sparse_attn import AdaptiveSparseMultiheadAttention, Entmax, alpha_per_head, versions
from sparse_attn.optim import alpha_param_groups, alpha_penalty, freeze_alpha, project_alpha, set_alpha

pytestmark = pytest.mark.slow  # starting two processes takes long

with_fsdp = since_torch(2, 8, "FSDP2 does not run on a CPU")

RANKS, STEPS = 2, 4
N, L, E = 6, 5, 14


class Block(nn.Module):
    def __init__(self, heads: int, alpha: Any, checkpointed: bool) -> None:
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(E, heads, batch_first=True, alpha_init=alpha)
        self.linear = nn.Linear(E, E)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, use_reentrant=False) if self.checkpointed else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.linear(x).tanh()


class Model(nn.Module):
    """A layer with seven heads, some on a bound; a layer with one head; and a mapping with one α."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        several = Block(7, [1.0, 1.0, 2.0, 2.0, 1.5, 1.25, 1.75], checkpointed)
        self.blocks = nn.ModuleList([several, Block(1, 1.0, checkpointed)])
        self.gate = Entmax(torch.tensor([1.5]), learn_alpha=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.gate(x)


def make(checkpointed: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(checkpointed).double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, L, E, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def named(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def trained(model: nn.Module, rows: slice, *, penalty: float = 0.0, clip: bool = True) -> dict[str, Any]:
    """The gradients of the first step, and the parameters after the last step."""
    optimizer = torch.optim.AdamW(alpha_param_groups(model, lr=1e-2, weight_decay=0.1, alpha_lr=2e-2))
    optimizer.register_step_post_hook(lambda *_: project_alpha(model))
    grads = {}
    for x in batches():
        optimizer.zero_grad()
        loss = (model(x[rows]) * x[rows].sin()).sum((1, 2)).mean()
        if penalty:
            loss = loss + alpha_penalty(model, 1.5, strength=penalty)
        loss.backward()
        grads = grads or {name: full(p.grad) for name, p in named(model).named_parameters()}
        if clip:
            clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"grads": grads, "parameters": {name: full(p) for name, p in named(model).named_parameters()}}


def sharded() -> Model:
    model = make()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def mine() -> slice:
    share = N // RANKS
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def ddp(folder: Path) -> Any:
    return trained(DistributedDataParallel(make()), mine())


def ddp_checkpointed(folder: Path) -> Any:
    return trained(DistributedDataParallel(make(checkpointed=True)), mine())


def fsdp(folder: Path) -> Any:
    return trained(sharded(), mine())


def fsdp_with_penalty(folder: Path) -> Any:
    return trained(sharded(), mine(), penalty=3.0)


def kept_whole(dtype: torch.dtype) -> Model:
    """A sharded model with all α excluded from sharding, as in docs/alpha.md."""
    model = make().to(dtype)
    alphas = {p for name, p in model.named_parameters() if name.endswith("raw_alpha")}
    for module in (*model.blocks, model):
        fully_shard(module, ignored_params=alphas)
    for alpha in alphas:
        alpha.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(dist.get_world_size())))
    return model


def fsdp_alpha_kept_whole(folder: Path) -> Any:
    return trained(
        kept_whole(torch.float64), mine(), clip=False
    )  # a norm over both sharded and complete gradients is not supported


def fsdp_bfloat16(folder: Path) -> Any:
    """α and the dtype of a weight in the forward of a layer, and the gradient of α."""
    model, seen = kept_whole(torch.bfloat16), {}
    attention = model.blocks[0].attention
    attention.register_forward_hook(
        lambda *_: seen.update(alpha=attention.alpha, weight=attention.out_proj.weight.dtype)
    )
    model(batches()[0][mine()].bfloat16()).float().sum().backward()
    return {"alpha": seen["alpha"].detach(), "weight": seen["weight"], "grad": attention.raw_alpha.grad}


def fsdp_alpha(folder: Path) -> Any:
    """α of a sharded model, read and set before its first forward and after."""
    model = sharded()
    raw = model.blocks[1].attention.raw_alpha
    found = {"is sharded": isinstance(raw, DTensor), "mine": raw.to_local().numel(), "before": alpha_per_head(model)}
    model(batches()[0][mine()])
    found["after"] = alpha_per_head(model)
    set_alpha(model, {"blocks.0.attention": [1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "blocks.1.attention": 1.9})
    found["set"] = alpha_per_head(model)
    model(batches()[0][mine()]).sum().backward()
    freeze_alpha(model)
    found["frozen"] = [p.grad is None for name, p in model.named_parameters() if name.endswith("raw_alpha")]
    model.blocks[0].attention._reset_parameters()
    found["reset"] = alpha_per_head(model)
    return found


def fsdp_checkpoint(folder: Path) -> Any:
    """Saves and loads the sharded state; returns α of the loaded model, and the full state."""
    import torch.distributed.checkpoint as dcp

    model = sharded()
    set_alpha(model, 1.625)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "sharded")
    other = sharded()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "sharded")
    other.load_state_dict(state["model"])
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"loaded": alpha_per_head(other), "full": whole}


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    function.__name__: function
    for function in (
        ddp,
        ddp_checkpointed,
        fsdp,
        fsdp_with_penalty,
        fsdp_alpha_kept_whole,
        fsdp_bfloat16,
        fsdp_alpha,
        fsdp_checkpoint,
    )
}


if versions.TORCH < (2, 8):
    SCENARIOS = {name: function for name, function in SCENARIOS.items() if "fsdp" not in name}


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(folder), folder / f"{name}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of both processes, by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    # The processes import the package from the same place as this process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pair = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [one.communicate(timeout=120)[0] for one in pair]
    finally:
        for one in pair:
            one.kill()
    assert [one.returncode for one in pair] == [0] * RANKS, "\n".join(said)
    return {name: [torch.load(folder / f"{name}.{rank}") for rank in range(RANKS)] for name in SCENARIOS}


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "ddp_checkpointed",
        *(pytest.param(name, marks=with_fsdp) for name in ("fsdp", "fsdp_with_penalty", "fsdp_alpha_kept_whole")),
    ],
)
def test_two_processes_take_the_same_steps_as_one(results: dict[str, list[Any]], name: str) -> None:
    alone = trained(make(), slice(None), penalty=3.0 if "penalty" in name else 0.0, clip="whole" not in name)
    for found in results[name]:
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
    moved = torch.cat([p for name, p in alone["parameters"].items() if name.endswith("raw_alpha")])
    start = torch.cat([p.detach() for name, p in make().named_parameters() if name.endswith("raw_alpha")])
    assert int((moved != start).sum()) >= 6, "too few α have moved: of the nine, five begin on a bound"


def test_gradients_of_a_head_at_its_bound_differ_in_sign_between_the_processes() -> None:
    """Without this, the test above could not detect that gradients are projected before they are summed."""
    signs = []
    for rows in (slice(0, N // 2), slice(N // 2, None)):
        grads = trained(make(), rows)["grads"]
        signs.append(grads["blocks.0.attention.raw_alpha"][:4].sign())
    assert bool((signs[0] != signs[1]).any())


@with_fsdp
def test_alpha_of_a_sharded_model_is_complete(results: dict[str, list[Any]]) -> None:
    expected = alpha_per_head(make())
    for found in results["fsdp_alpha"]:
        assert found["is sharded"]
        for when in ("before", "after"):
            torch.testing.assert_close(found[when], expected)
            assert all(type(alpha) is Tensor for alpha in found[when].values())
        numbers = [alpha.tolist() for alpha in found["set"].values()]
        assert numbers == [pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]), pytest.approx([1.9])]
        assert found["frozen"] == [True] * 3
        torch.testing.assert_close(found["reset"]["blocks.0.attention"], expected["blocks.0.attention"])
    assert sorted(found["mine"] for found in results["fsdp_alpha"]) == [0, 1], "one process must hold no head"


@with_fsdp
def test_a_sharded_bfloat16_model_keeps_a_float32_alpha(results: dict[str, list[Any]]) -> None:
    first, second = results["fsdp_bfloat16"]
    assert (first["alpha"].dtype, first["weight"], first["grad"].dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    assert torch.equal(first["grad"], second["grad"]) and bool(first["grad"].any())


@with_fsdp
def test_a_sharded_checkpoint_is_loaded_with_and_without_sharding(results: dict[str, list[Any]]) -> None:
    for found in results["fsdp_checkpoint"]:
        assert all(set(alpha.tolist()) == {1.625} for alpha in found["loaded"].values())
    plain = copy.deepcopy(make())
    plain.load_state_dict(results["fsdp_checkpoint"][0]["full"], strict=True)
    assert all(set(alpha.tolist()) == {1.625} for alpha in alpha_per_head(plain).values())


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
