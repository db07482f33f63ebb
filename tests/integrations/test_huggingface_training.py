"""Training with transformers' Trainer, with LoRA under activation checkpointing, and by two processes of accelerate.

Run as a program, this file is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn import alpha_per_head
from sparse_attn.integrations.huggingface import add_alpha, register
from sparse_attn.optim import alpha_param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LENGTHS = (7, 11, 5, 3, 9, 4)


def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(17)
    return [{"input_ids": torch.randint(3, 37, (length,), generator=generator).tolist()} for length in LENGTHS]


def padded(parts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A padded batch; the padding tokens have no label."""
    width = max(len(part["input_ids"]) for part in parts)
    ids = torch.tensor([part["input_ids"] + [0] * (width - len(part["input_ids"])) for part in parts])
    seen = torch.tensor([[i < len(part["input_ids"]) for i in range(width)] for part in parts])
    return {"input_ids": ids, "attention_mask": seen.long(), "labels": ids.masked_fill(~seen, -100)}


def trained(model: Any, folder: Path, collator: Any) -> list[float]:
    """The losses of four steps of the Trainer, which must give α no weight decay."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=3,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        weight_decay=0.1,
        dataloader_pin_memory=False,
        seed=3,
    )
    optimizer = torch.optim.AdamW(alpha_param_groups(model, lr=1e-2, weight_decay=0.1, alpha_lr=3e-2))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples(), data_collator=collator, optimizers=(optimizer, None)
    )
    trainer.train()
    alphas = [group for group in optimizer.param_groups if len(group["params"]) == 2]
    assert [group["weight_decay"] for group in alphas] == [0.0]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_learns_alpha_and_packs_sequences(build, tmp_path):
    losses, alphas = [], []
    for collator in (padded, transformers.DataCollatorWithFlattening()):
        model = build("mistral", "entmax")
        add_alpha(model, alpha_init=1.3)
        losses.append(trained(model, tmp_path, collator))
        alphas.append(torch.stack(list(alpha_per_head(model).values())).detach())
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(alphas[1], alphas[0], rtol=0, atol=2e-3)
    assert ((alphas[0] - 1.3).abs() > 1e-3).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_lora_and_alpha_are_the_same_with_activation_checkpointing(reentrant, build):
    peft = pytest.importorskip("peft")
    gradients = []
    for checkpointed in (False, True):
        model = build("llama", "entmax")
        add_alpha(model, alpha_init=1.4)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["sparse_alpha"])
        model = peft.get_peft_model(model, config).train()
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        model(**padded(examples()), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert sum("raw_alpha" in name for name in gradients[0]) == 2
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def alphas_after_training(accelerator: Any) -> Tensor:
    """α after three steps, in which each process takes its share of every batch."""
    register()
    sizes = {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 13}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.manual_seed(7)
    config = transformers.GPT2Config(**sizes, **dropout, initializer_range=0.3)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="entmax")
    add_alpha(model, alpha_init=1.3)
    optimizer = torch.optim.SGD(alpha_param_groups(model, lr=1e-3, alpha_lr=1e-1))
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(3, 37, (11,), generator=generator) for _ in range(12)]
    loader = torch.utils.data.DataLoader(data, batch_size=4 // accelerator.num_processes)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids in loader:
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
    return torch.stack(list(alpha_per_head(accelerator.unwrap_model(model)).values())).detach()


@pytest.mark.slow  # two processes have to start
def test_two_processes_of_accelerate_give_the_result_of_one(tmp_path):
    from accelerate import Accelerator

    expected = alphas_after_training(Accelerator(cpu=True))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = [*launch, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
    assert ((expected - 1.3).abs() > 1e-3).any()


if __name__ == "__main__":
    from accelerate import Accelerator

    process = Accelerator(cpu=True)
    assert process.num_processes == 2
    torch.save(alphas_after_training(process), Path(sys.argv[1], f"{process.process_index}.pt"))
