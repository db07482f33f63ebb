"""The schedule of α over training steps, in any LightningModule and in the recipes."""

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.data import DataLoader

from recipes.callbacks.alpha_schedule import AlphaSchedule
from recipes.curves import read_rows
from recipes.fit import quiet
from recipes.launch import Interrupted
from recipes.resume import resume_arguments
from recipes.run import load_run
from recipes.seq2seq.task import Seq2SeqTask
from recipes.train import train
from sparse_attn import AdaptiveSparseMultiheadAttention, EntmaxLoss, alpha_per_head
from sparse_attn.optim import alpha_param_groups

E, H, BATCHES = 6, 2, 6


class Own(L.LightningModule):
    """A user's module, which stores the α of every forward."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, **kwargs)
        self.linear = nn.Linear(E, 1)
        self.seen = {"train": [], "val": []}

    def loss(self, x, stage):
        self.seen[stage].append(self.attention.alpha.tolist())
        return self.linear(self.attention(x, x, x)[0]).square().mean()

    def training_step(self, x, _):
        return self.loss(x, "train")

    def validation_step(self, x, _):
        self.loss(x, "val")

    def configure_optimizers(self):
        return torch.optim.SGD(alpha_param_groups(self, lr=0.1, strict=False))


def fit(module, schedule, tmp_path, checkpoint=None, **arguments):
    loader = DataLoader([torch.randn(5, E) for _ in range(BATCHES * 3)], batch_size=3)
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **arguments}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    with quiet():
        trainer = L.Trainer(callbacks=[schedule], **settings)
        trainer.fit(module, loader, DataLoader([torch.randn(5, E)]), ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_every_step_uses_the_scheduled_alpha(learn_alpha, tmp_path):
    module = Own(learn_alpha=learn_alpha, alpha_init=1.75)
    fit(module, AlphaSchedule(start=1.0, end=1.5, first_step=1, last_step=5), tmp_path)
    expected = [1.0, 1.0, 1.125, 1.25, 1.375, 1.5]
    torch.testing.assert_close(torch.tensor(module.seen["train"]), torch.tensor(expected)[:, None].expand(-1, H))
    # α is also set for Lightning's trial validation before the first step. The second validation follows the last step.
    assert [alphas[0] for alphas in module.seen["val"]] == [1.0, pytest.approx(1.5, abs=0 if not learn_alpha else 0.1)]


def test_micro_batches_of_a_step_share_its_alpha(tmp_path):
    module = Own(learn_alpha=False)
    fit(module, AlphaSchedule(start=1.0, end=1.5, last_step=2), tmp_path, accumulate_grad_batches=3)
    assert [alphas[0] for alphas in module.seen["train"]] == [1.0] * 3 + [1.25] * 3
    assert module.attention.alpha.tolist() == [1.5] * H


def test_a_learnt_alpha_is_trained_after_the_schedule(tmp_path):
    module = Own()
    fit(module, AlphaSchedule(start=1.0, end=1.5, last_step=3), tmp_path)
    line, after = torch.tensor(module.seen["train"]).split([4, 2])
    torch.testing.assert_close(line[:, 0], torch.tensor([1.0, 1 + 1 / 6, 1 + 2 / 6, 1.5]))
    assert bool((after != 1.5).all()) and bool((after - 1.5).abs().max() < 0.2)


def test_a_resumed_training_continues_the_schedule(tmp_path):
    def schedule():
        return AlphaSchedule(start=1.0, end=2.0, last_step=16)

    first = Own(learn_alpha=False)
    trainer = fit(first, schedule(), tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = Own(learn_alpha=False)
    fit(second, schedule(), tmp_path, tmp_path / "x.ckpt", max_epochs=2)
    seen = torch.tensor(first.seen["train"] + second.seen["train"])[:, 0]
    torch.testing.assert_close(seen, 1 + torch.arange(2 * BATCHES) / 16)


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_a_training_resumed_after_the_schedule_does_not_set_alpha(learn_alpha, tmp_path):
    module = Own(learn_alpha=learn_alpha)
    trainer = fit(module, AlphaSchedule(start=1.0, end=1.5, last_step=3), tmp_path)
    left = module.attention.alpha.tolist()
    trainer.fit_loop.max_epochs = 2
    with quiet():
        trainer.fit(module, DataLoader([torch.randn(5, E)] * 4), DataLoader([torch.randn(5, E)]))
    assert module.seen["train"][BATCHES] == left and (learn_alpha or left == [1.5] * H)


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_steps_of_several_optimizers_can_pass_the_end_of_the_schedule(learn_alpha, tmp_path):
    class Two(Own):
        automatic_optimization = False

        def training_step(self, x, _):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(x, "train"))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.attention.parameters(), lr=0.1), torch.optim.SGD(self.linear.parameters())

    module = Two(learn_alpha=learn_alpha)
    fit(module, AlphaSchedule(start=1.0, end=1.5, last_step=3), tmp_path)
    seen = torch.tensor(module.seen["train"])[::2, 0]
    torch.testing.assert_close(seen[:3], torch.tensor([1.0, 1 + 2 / 6, 1.5]))
    assert bool((seen[3:] == 1.5).all()) is not learn_alpha


def test_a_model_can_be_built_in_configure_model(tmp_path):
    class Late(Own):
        def __init__(self):
            super().__init__(learn_alpha=False)
            del self.attention

        def configure_model(self):
            self.attention = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, learn_alpha=False)

    module = Late()
    fit(module, AlphaSchedule(start=1.0, end=1.5, last_step=5), tmp_path, num_sanity_val_steps=0)
    torch.testing.assert_close(torch.tensor(module.seen["train"])[:, 0], 1 + torch.arange(BATCHES) / 10)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_validation_a_test_or_a_prediction_does_not_set_alpha(stage):
    module = Own(learn_alpha=False, alpha_init=1.75)
    AlphaSchedule(last_step=5).setup(L.Trainer(accelerator="cpu", logger=False), module, stage)
    assert module.attention.alpha.tolist() == [1.75] * H


def test_the_recipe_anneals_records_and_keeps_alpha(tiny_config, tmp_path):
    overrides = ("callbacks=anneal_alpha", "callbacks.anneal_alpha.last_step=8", "model.attention=entmax")
    train(tiny_config(*overrides))
    rows = read_rows(tmp_path / "run/alpha.csv")
    for row in rows:
        assert row["alpha"] == f"{1 + min(int(row['step']) / 16, 0.5):.6f}"
    assert {row["step"] for row in rows} == {str(step) for step in range(11)}
    run = load_run(tmp_path / "run", "last")
    assert all(alpha.tolist() == [1.5] * 2 for alpha in alpha_per_head(run.task.model).values())
    assert run.config.callbacks.anneal_alpha.last_step == 8


def test_an_interrupted_annealing_can_be_resumed(tiny_config, tmp_path, monkeypatch):
    overrides = ("callbacks=anneal_alpha", "callbacks.anneal_alpha.last_step=16")
    train(tiny_config(*overrides, f"paths.output_dir={tmp_path / 'straight'}"))
    step = Seq2SeqTask.training_step

    def interrupted(self, *arguments):
        if self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Seq2SeqTask, "training_step", interrupted)
        with pytest.raises(Interrupted):
            train(tiny_config(*overrides))
    arguments, config = resume_arguments([f"resume={tmp_path / 'run'}"])
    with initialize_config_dir(str(config.parent), version_base="1.3"):
        train(compose(config.stem, [argument for argument in arguments if not argument.startswith("hydra")]))
    for name in ("alpha.csv", "metrics.csv"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "straight" / name).read_text()


def test_a_configuration_of_a_version_without_callbacks_can_be_trained(tiny_config):
    cfg = tiny_config("trainer.max_epochs=1")
    del cfg.callbacks
    assert train(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_step": 0}, "last_step must be above first_step, got 0 and 0"),
        ({"first_step": 7, "last_step": 5}, "last_step must be above first_step, got 5 and 7"),
        ({"start": 0.0, "last_step": 5}, r"start must be in \(0, inf\), got 0.0"),
        ({"end": float("nan"), "last_step": 5}, r"end must be in \(0, inf\), got nan"),
    ],
)
def test_an_invalid_schedule_raises_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**arguments)


@pytest.mark.parametrize("name", ["start", "end", "first_step", "last_step"])
def test_arguments_of_a_wrong_type_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} must be a number.*, got"):
        AlphaSchedule(**{"last_step": 9, name: "9"})


class Judged(Own):
    """A module with an α in its loss."""

    def __init__(self):
        super().__init__()
        self.judge = EntmaxLoss(alpha=1.25)


@pytest.mark.parametrize(
    ("arguments", "attention", "judge"),
    [({}, 1.75, 1.25), ({"filter_fn": None}, 1.75, 1.75), ({"filter_fn": lambda name, _: name == "judge"}, 1.5, 1.75)],
)
def test_the_schedule_changes_attention_by_default_or_the_modules_of_filter_fn(arguments, attention, judge, tmp_path):
    module = Judged()
    fit(module, AlphaSchedule(end=1.75, last_step=BATCHES, **arguments), tmp_path)
    assert float(module.judge.alpha) == judge
    assert module.attention.alpha.tolist() == pytest.approx([attention] * H, abs=0.1)


def test_a_model_in_which_only_the_loss_has_alpha_is_refused(tmp_path):
    module = Judged()
    del module.attention
    with pytest.raises(ValueError, match="filter_fn must accept at least one module with an α, got none of 'judge'"):
        fit(module, AlphaSchedule(last_step=5), tmp_path)


@pytest.mark.parametrize("arguments", [{"end": 2.5}, {"start": 0.5}, {"start": 1.0, "end": 2.5}])
@pytest.mark.parametrize("late", [False, True])
def test_a_schedule_outside_the_range_is_refused_before_the_first_step(arguments, late, tmp_path):
    module = Own(alpha_init=1.75)
    if late:
        module.configure_model = lambda: None
    with pytest.raises(ValueError, match=r"value for 'attention' must be in alpha_range \[1, 2\], got"):
        fit(module, AlphaSchedule(**arguments, last_step=5), tmp_path, num_sanity_val_steps=0)
    assert module.seen == {"train": [], "val": []}
    assert module.attention.alpha.tolist() == [1.75] * H


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["callbacks.anneal_alpha.last_step=many"],
            TypeError,
            "callbacks.anneal_alpha.last_step must be a whole number",
        ),
        (["+callbacks.anneal_alpha.until=5"], ValueError, "unknown key 'callbacks.anneal_alpha.until'; allowed: start"),
        (["callbacks.anneal_alpha.last_step=-1"], ValueError, "last_step must be above first_step, got -1 and 0"),
        (["callbacks.anneal_alpha=null"], TypeError, "callbacks.anneal_alpha must be a group of keys with _target_"),
        (
            ["callbacks.anneal_alpha._target_=recipes.nothing"],
            ValueError,
            "_target_ must name a class, got 'recipes.noth",
        ),
        (["callbacks.anneal_alpha._target_=torch.nn.Linear"], ValueError, "must name a lightning.Callback, got 'torch"),
        (["~callbacks.anneal_alpha.last_step"], TypeError, "missing 1 required keyword-only argument: 'last_step'"),
        (["model.attention=topk"], ValueError, "model must hold an α, got none in Seq2SeqTask"),
        (["callbacks.anneal_alpha.end=2.5"], ValueError, r"must be in alpha_range \[1, 2\], got 2.5"),
    ],
)
def test_an_invalid_config_is_refused(tiny_config, overrides, error, message):
    with pytest.raises(error, match=message):
        train(tiny_config("callbacks=anneal_alpha", *overrides))
