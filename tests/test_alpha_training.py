"""Training steps of α: compiled, checkpointed, accumulated, averaged, with AdamW and SGD, and with mixed dtypes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from encoders import sparse_encoder
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sparse_attn import alpha_per_head
from sparse_attn.optim import alpha_param_groups, alpha_penalty, linear_alpha, project_alpha, set_alpha

# Warnings of torch itself, at the first compilation in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

N, L, H, E, F = 3, 5, 2, 14, 11


encoder = partial(sparse_encoder, E, H, F)


@pytest.mark.parametrize("kind", ["learnt", "learnt, projected, with a penalty", "fixed, annealed"])
def test_a_compiled_training_step_never_recompiles_while_alpha_moves(kind: str) -> None:
    learnt = kind.startswith("learnt")
    model = encoder(layers=1, learn_alpha=learnt, alpha_init=1.0).double()
    set_alpha(model, 1.0)  # a fixed α becomes a buffer, before the model is traced
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sin().sum() + (alpha_penalty(model, strength=20.0) if "penalty" in kind else 0.0)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    seen = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(5):
        x = torch.randn(N, L, E, dtype=torch.float64)
        for m, function, optimizer in zip((model, twin), (compiled, loss), optimizers, strict=True):
            optimizer.zero_grad()
            function(m, x).backward()
            optimizer.step()
            if "projected" in kind:
                project_alpha(m)
            if not learnt:
                set_alpha(m, linear_alpha(step + 1, 1.0, 1.5, last_step=4))
        (alpha,) = alpha_per_head(model).values()
        seen.append(tuple(alpha.tolist()))
        torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert counter.frame_count == 1
    assert len(set(seen)) > 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_does_not_change_gradients(use_reentrant: bool) -> None:
    model = encoder(alpha_init=[1.0, 1.7])
    x = torch.randn(N, L, E, requires_grad=True)
    model(x).pow(3).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    y = x
    for layer in model.layers:
        y = checkpoint(layer, y, use_reentrant=use_reentrant)
    y.pow(3).sum().backward()
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_accumulated_gradients_give_the_steps_of_the_joined_batch() -> None:
    models = [encoder(alpha_init=[1.0, 2.0]).double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(alpha_param_groups(m, lr=1e-2, weight_decay=0.1)) for m in models]
    for m, optimizer in zip(models, optimizers, strict=True):
        optimizer.register_step_post_hook(lambda *_, m=m: project_alpha(m))
    for _ in range(7):
        x = torch.randn(6, L, E, dtype=torch.float64)
        for parts, m, optimizer in zip((1, 3), models, optimizers, strict=True):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                m(part).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(*[dict(m.named_parameters()) for m in models])
    alphas = torch.stack(list(alpha_per_head(models[0]).values()))
    assert bool((alphas != torch.tensor([1.0, 2.0])).any()), "no head has left its bound"


def test_an_averaged_model_averages_alpha() -> None:
    model = encoder(alpha_init=1.5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(alpha_param_groups(model, lr=0.0, alpha_lr=0.01))
    expected = torch.full((2, H), 1.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(N, L, E)).pow(3).sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        expected = 0.75 * expected + 0.25 * torch.stack(list(alpha_per_head(model).values()))
    found = alpha_per_head(averaged)
    assert list(found) == ["module.layers.0.self_attn", "module.layers.1.self_attn"]
    torch.testing.assert_close(torch.stack(list(found.values())), expected)
    assert bool((expected != 1.5).all())


def test_an_averaged_model_follows_an_annealed_alpha() -> None:
    model = encoder(learn_alpha=False)
    set_alpha(model, 1.0)
    averaged = AveragedModel(model)
    set_alpha(model, 1.25)
    averaged.update_parameters(model)
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(averaged).values())


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_adamw_and_sgd_can_train_a_bfloat16_model_with_a_float32_alpha(
    make_optimizer: type[torch.optim.Optimizer], how: dict[str, bool]
) -> None:
    model = encoder(alpha_init=1.5).bfloat16()
    optimizer = make_optimizer(alpha_param_groups(model, lr=1e-3), **how)
    mixed = make_optimizer(model.parameters(), lr=1e-3, **how)  # all dtypes in one group
    for each in (optimizer, mixed):
        before = alpha_per_head(model)
        each.zero_grad()
        model(torch.randn(N, L, E, dtype=torch.bfloat16)).float().pow(3).sum().backward()
        norm = clip_grad_norm_(model.parameters(), 0.5, foreach=how.get("foreach"))
        assert bool(norm.isfinite())
        total = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        assert total.item() == pytest.approx(0.5, rel=0.02)
        each.step()
        for name, alpha in alpha_per_head(model).items():
            assert alpha.dtype == torch.float32 and bool((alpha != before[name]).all())
