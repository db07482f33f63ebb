from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from recipes.callbacks.checkpoints import BestAndLast
from recipes.curves import read_rows
from recipes.plan import FEWEST_EPOCHS, FEWEST_UPDATES, Plan, plan_training
from recipes.predictions import read_predictions
from recipes.run import load_run
from recipes.summary import early_stop
from recipes.train import train


@pytest.mark.parametrize(
    ("section", "batches", "plan"),
    [
        ({"max_epochs": 7}, 13, Plan(7, 13, 13, 91)),
        ({"max_epochs": 7, "limit_train_batches": 5}, 13, Plan(7, 5, 13, 35)),
        ({"max_epochs": 7, "limit_train_batches": 0.5}, 13, Plan(7, 6, 13, 42)),
        ({"max_epochs": 7, "accumulate_grad_batches": 3}, 13, Plan(7, 13, 13, 35)),
        ({"max_epochs": 7, "max_steps": 20}, 13, Plan(7, 13, 13, 20)),
        ({"max_steps": 27}, 13, Plan(3, 13, 13, 27)),
        ({"max_epochs": None}, 1009, Plan(FEWEST_EPOCHS, 1009, 1009, 1009 * FEWEST_EPOCHS)),
    ],
)
def test_a_plan_counts_epochs_batches_and_updates(section, batches, plan):
    assert plan_training(section, batches) == plan


def test_the_default_number_of_epochs_gives_the_minimum_of_updates():
    plan = plan_training({}, 13)
    assert FEWEST_UPDATES <= plan.updates < FEWEST_UPDATES + 13


def test_without_max_epochs_the_planned_epochs_are_printed_and_recorded(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.plan.FEWEST_UPDATES", 12)
    monkeypatch.setattr("recipes.plan.FEWEST_EPOCHS", 1)
    train(tiny_config("trainer.max_epochs=null"))
    assert "3 epochs of 5 batches: 15 updates, 3 of them warm-up" in capsys.readouterr().out
    config = load_run(tmp_path / "run").config
    assert (config.trainer.max_epochs, config.monitor) == (3, "val/per")


def test_notes_report_a_long_warm_up_and_unseen_symbols(tiny_config, tmp_path, capsys):
    cfg = tiny_config("trainer.max_epochs=1", "optimizer.warmup_steps=4", "trainer.limit_train_batches=4")
    (tmp_path / "test.tsv").write_text("zzz\tQ Q\n", encoding="utf-8")
    train(cfg)
    out = capsys.readouterr().out
    assert "1 epoch of 4 of 5 batches (trainer.limit_train_batches): 4 updates, 4 of them warm-up" in out
    assert (
        "note: the warm-up of 4 updates is more than half of this training's 4 updates (optimizer.warmup_steps)" in out
    )
    assert 'note: 1 of 1 test inputs hold symbols never seen in training: "z"' in out
    assert 'note: 1 of 1 test targets hold symbols never seen in training: "Q"' in out


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "noam", "cosine"])
def test_a_training_uses_the_chosen_schedule(tiny_config, tmp_path, schedule):
    train(tiny_config(f"schedule={schedule}", "trainer.max_epochs=1"))
    assert load_run(tmp_path / "run").task.hparams["schedule"] == schedule


def test_the_monitored_metric_chooses_the_best_checkpoint(tiny_config, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        BestAndLast, "_save", lambda self, trainer, name, **_: saved.append((trainer.current_epoch, name))
    )
    monkeypatch.setattr("recipes.train.conclude", lambda *_, **__: {}, raising=False)
    monkeypatch.setattr("recipes.summary.conclude", lambda *_, **__: {})
    train(tiny_config("monitor=val/accuracy", "trainer.max_epochs=6"))
    accuracies = [float(row["val/accuracy"]) for row in read_rows(tmp_path / "run/metrics.csv") if row["val/accuracy"]]
    best = [epoch for epoch, value in enumerate(accuracies) if value > max(accuracies[:epoch], default=-1.0)]
    assert [epoch for epoch, name in saved if name == "best.ckpt"] == best


@pytest.mark.parametrize("monitor", ["val/bleu", "test/wer", "wer", "val/wer/hun", "val/ter"])
def test_monitoring_a_metric_that_is_not_computed_is_refused(tiny_config, tmp_path, monitor):
    message = (
        "^monitor must be one of val/loss, val/support, val/per, val/wer, val/accuracy, val/edit_distance "
        rf"\(data.metrics chooses the metrics\), got '{monitor}'$"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny_config(f"monitor={monitor}"))
    assert not (tmp_path / "run").exists()


def test_a_training_that_stops_early_prints_the_reason(tiny_config, tmp_path, capsys):
    stopping = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    train(tiny_config(*stopping, "trainer.max_epochs=50", "optimizer.learning_rate=1e-12"))
    out = capsys.readouterr().out
    assert "stopped early after epoch 2: val/per has not improved for 1 validation" in out


@pytest.mark.parametrize(
    ("stopping", "reason"),
    [
        ({"stopping_threshold": 1e9}, "val/per has reached the stopping_threshold of 1000000000.0"),
        ({"divergence_threshold": 1e-9}, "val/per has passed the divergence_threshold of 1e-09"),
    ],
)
def test_a_training_that_a_threshold_stops_prints_this_reason(tiny_config, tmp_path, capsys, stopping, reason):
    given = [f"callbacks.early_stopping.{name}={value}" for name, value in stopping.items()]
    train(tiny_config("callbacks=early_stopping", *(f"+{each}" for each in given), "trainer.max_epochs=3"))
    assert f"stopped early after epoch 1: {reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (float("nan"), "stopped early after epoch 1: val/per is not a finite number"),
        (3.0, None),
    ],
)
def test_a_first_score_stops_a_training_only_if_it_is_not_finite(score, reason):
    stopping = EarlyStopping("val/per", patience=1)
    trainer = SimpleNamespace(
        should_stop=False,
        early_stopping_callbacks=[stopping],
        callback_metrics={"val/per": torch.tensor(score)},
        fast_dev_run=False,
        current_epoch=0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )
    stopping._run_early_stopping_check(trainer)
    assert early_stop(trainer) == reason


def test_a_resumed_training_that_did_not_stop_early_has_no_reason():
    stopping = EarlyStopping("val/per", patience=1)
    stopping.stopped_epoch, stopping.stopping_reason = 3, EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert early_stop(SimpleNamespace(should_stop=False, early_stopping_callbacks=[stopping])) is None


def test_predictions_of_the_test_words_are_kept(tiny_config, tmp_path):
    results = train(tiny_config("trainer.max_epochs=1"))
    found = read_predictions(tmp_path / "run" / "test_predictions.tsv")
    assert len(found) == 11
    assert 100 * sum(one.distance > 0 for one in found) / 11 == pytest.approx(results["test/wer"])
    assert 100 * sum(one.distance for one in found) / sum(one.length for one in found) == pytest.approx(
        results["test/per"]
    )
    task = load_run(tmp_path / "run").task
    assert task.target_tokenizer.join(task.predict_words([found[0].source])[0]) == found[0].prediction


def test_error_for_a_damaged_predictions_line_has_file_and_line_number(tmp_path):
    file = tmp_path / "test_predictions.tsv"
    file.write_text("source\tprediction\treference\tdistance\tlength\tgroup\na\tA\tB\tone\t1\t\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test_predictions\.tsv:2: a line must be source<TAB>prediction<TAB>.* got "):
        read_predictions(file)
