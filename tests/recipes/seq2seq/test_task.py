"""The Lightning module: loss, groups of parameters, schedule, prediction, scores."""

import pytest
import torch
from torch.nn import functional as F

from recipes.seq2seq.schedules import rate_factor
from recipes.seq2seq.scores import Scores, score
from recipes.seq2seq.task import Seq2SeqTask
from recipes.seq2seq.tokenizer import Tokenizer
from sparse_attn import entmax15_loss, sparsemax, sparsemax_loss

SOURCE = Tokenizer.fit(["abcde"], split="characters", normalization="NFC")
TARGET = Tokenizer.fit(["A B C"], split="spaces", normalization="NFC")
MODEL = {"dim": 12, "num_heads": 3, "ff_dim": 20, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}


def make_task(**arguments) -> Seq2SeqTask:
    arguments = {"model": MODEL, "max_length": 5, **arguments}
    return Seq2SeqTask(source_tokenizer=SOURCE.state(), target_tokenizer=TARGET.state(), **arguments)


BATCH = {
    "source": torch.tensor([[4, 5, 2, 0], [6, 7, 8, 2]]),
    "target_in": torch.tensor([[1, 4, 0], [1, 5, 6]]),
    "target_out": torch.tensor([[4, 2, 0], [5, 6, 2]]),
    "sources": ["ab", "cde"],
    "references": [[["A"]], [["B", "C"], ["B"]]],
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_loss_is_the_mean_over_real_tokens(smoothing, monkeypatch):
    task = make_task(label_smoothing=smoothing)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)  # there is no trainer
    loss = task.training_step(BATCH, 0)
    logits = task.model(BATCH["source"], BATCH["target_in"])
    log = F.log_softmax(logits, -1)
    right = log.gather(-1, BATCH["target_out"][..., None])[..., 0]
    each = -((1 - smoothing) * right + smoothing * log.mean(-1))
    torch.testing.assert_close(loss, each[BATCH["target_out"] != 0].mean())


def test_alpha_has_its_own_learning_rate_and_only_matrices_have_weight_decay():
    task = make_task(alpha_learning_rate=0.5, weight_decay=0.25)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    groups = task.parameter_groups()
    found = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert sum(map(len, found)) == len(names)
    weights, biases, alpha = found
    assert alpha and all(name.endswith("raw_alpha") for name in alpha)
    assert not any(name.endswith("raw_alpha") for name in weights | biases)
    assert all(task.get_parameter(name).ndim == 1 for name in biases)
    assert any("norm" in name for name in biases)
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0, 0.0]
    assert groups[2]["lr"] == 0.5


def test_a_model_without_a_learnt_alpha_has_no_parameter_group_for_alpha():
    kinds = dict.fromkeys(("encoder_attention", "decoder_attention", "cross_attention"), "softmax")
    assert len(make_task(model={**MODEL, **kinds}).parameter_groups()) == 2


def test_every_group_follows_the_schedule():
    task = make_task(learning_rate=0.25, alpha_learning_rate=0.5, warmup_steps=2, max_steps=6)
    configured = task.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(7):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates == [[0.25 * factor, 0.25 * factor, 0.5 * factor] for factor in factors]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.98)] * 3


@pytest.mark.parametrize(("warmup", "total"), [(0, 5), (5, 5), (9, 5), (3, 1)])
def test_schedule_stays_between_zero_and_one(warmup, total):
    factors = [rate_factor(step, warmup, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert rate_factor(total, warmup, total) == 0 or warmup >= total


def test_predictions_do_not_depend_on_the_batch():
    task = make_task().eval()
    words = ["a", "edcba", "bb", "", "zz"]
    together = task.predict_words(words, batch_size=2)
    assert together == [task.predict_words([word])[0] for word in words]
    assert all(set(tokens) <= {"A", "B", "C", "<unk>"} and len(tokens) <= 5 for tokens in together)


def test_score_computes_loss_support_and_error_rates(monkeypatch):
    task = make_task().train()
    monkeypatch.setattr(task, "_decode", lambda source: [["A"], ["B"]])
    scores = score(task, [BATCH])
    assert task.training
    logits = task.model(BATCH["source"], BATCH["target_in"])
    expected = F.cross_entropy(logits.flatten(0, 1), BATCH["target_out"].flatten(), ignore_index=0)
    # Under softmax, four tokens are possible: A, B, C and the end. Padding, beginning and unknown are never generated.
    means = {"loss": pytest.approx(expected.item()), "support": 4.0}
    assert scores.metrics() == {**means, "per": 0.0, "wer": 0.0, "accuracy": 100.0, "edit_distance": 0.0}
    assert scores.sources == ["ab", "cde"]


def test_loss_and_support_of_a_sparsemax_output_are_computed_with_sparsemax():
    task = make_task(model={**MODEL, "output": "sparsemax"}).eval()
    with torch.no_grad():
        task.model.output.weight.mul_(0.5)
    decoded = []

    def decode(source):
        decoded.append(source)
        return [[4, 6], [5]]

    scores = score(task, [BATCH], decode)
    assert torch.equal(decoded[0], BATCH["source"])
    assert scores.predictions == [["A", "C"], ["B"]]
    real = BATCH["target_out"] != 0
    logits = task.model(BATCH["source"], BATCH["target_in"])[real].detach()
    expected = sparsemax_loss(logits, BATCH["target_out"][real])
    written = logits[:, [2, 4, 5, 6]]
    support = sparsemax(written).count_nonzero() / len(written)
    assert 1 < support < 4
    metrics = scores.metrics()
    assert (metrics["loss"], metrics["support"]) == (pytest.approx(expected.item()), pytest.approx(support.item()))


def test_training_uses_the_loss_of_the_output(monkeypatch):
    for output, loss in (("sparsemax", sparsemax_loss), ("entmax15", entmax15_loss)):
        task = make_task(model={**MODEL, "output": output}, label_smoothing=0.1)
        monkeypatch.setattr(task, "log", lambda *_, **__: None)
        logits = task.model(BATCH["source"], BATCH["target_in"]).flatten(0, 1)
        expected = loss(logits, BATCH["target_out"].flatten(), ignore_index=0, label_smoothing=0.1)
        torch.testing.assert_close(task.training_step(BATCH, 0), expected)


def test_scoring_without_words_raises_an_error():
    with pytest.raises(ValueError, match="at least one word"):
        Scores().metrics()


def test_hyper_parameters_are_plain_data(tmp_path):
    task = make_task()
    torch.save(dict(task.hparams), tmp_path / "x")
    again = Seq2SeqTask(**torch.load(tmp_path / "x", weights_only=True))
    assert again.state_dict().keys() == task.state_dict().keys()
    assert again.target_tokenizer.symbols == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"alpha_learning_rate": -1.0}, "alpha_learning_rate must be above 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(**arguments)


def test_groups_have_separate_scores_and_the_total_is_their_mean():
    scores = Scores(predictions=[["A"], ["A"], ["A"]], references=[[["A"]], [["B"]], [["A"]]], groups=["x", "x", "yy"])
    metrics = scores.metrics()
    assert {name: metrics[f"wer{name}"] for name in ("", "/x", "/yy")} == {"": 25.0, "/x": 50.0, "/yy": 0.0}
    scores.groups = ["x"] * 3
    assert scores.metrics()["wer"] == pytest.approx(100 / 3)
    assert "wer/x" not in scores.metrics()


def test_bleu_and_chrf_score_the_joined_tokens():
    pytest.importorskip("sacrebleu")
    scores = make_task(metrics=["bleu"]).new_scores()
    scores.predictions, scores.references = [["A", "B", "C", "A", "B"]], [[["A", "B", "C", "A", "B"]]]
    assert scores.metrics() == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    assert "tok:13a" in scores.signatures["bleu"]


def test_the_warm_up_is_a_share_of_the_training_unless_warmup_steps_is_given():
    assert make_task(warmup=0.25).warmup_steps(65) == 16
    assert make_task(warmup_steps=7).warmup_steps(65) == 7


def test_the_learning_rates_of_noam_follow_its_formula():
    task = make_task(learning_rate=2.0, schedule="noam", warmup_steps=4, max_steps=9)
    configured = task.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [2.0 * MODEL["dim"] ** -0.5 * min(s**-0.5, s * 4**-1.5) for s in range(1, 10)]
    assert rates == pytest.approx(expected)
