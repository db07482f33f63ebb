"""The LightningModule: the model with its loss, its optimizer and its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sparse_attn.optim import alpha_param_groups

from ..processes import share_of_batch
from .data.batching import EVAL_BATCH_TOKENS, BatchByLength, pad
from .decode import greedy_decode
from .model import Seq2SeqTransformer
from .output import next_token_log_probabilities, output_loss
from .schedules import check_schedule, rate_factor
from .scores import Decode, Scores
from .tokenizer import PAD, Tokenizer

Decoded = TypeVar("Decoded")

# Version of the layout of checkpoints, increased when weights or hyper-parameters of earlier versions no longer fit.
LAYOUT = 2


class Seq2SeqTask(L.LightningModule):
    """A ``Seq2SeqTransformer`` under teacher forcing, with AdamW and a schedule of its learning rate.

    Every argument is plain data, so that a checkpoint holds nothing else and loads under
    ``torch.load(weights_only=True)``.

    Args:
        source_tokenizer: Arguments of the source ``Tokenizer``, as its ``state()`` gives them.
        target_tokenizer: Arguments of the target ``Tokenizer``, in the same form.
        model: Arguments of ``Seq2SeqTransformer``, without the sizes of the vocabularies and ``feature_ids``.
        learning_rate: Highest learning rate of the weights, reached after the warm-up.
        alpha_learning_rate: Highest learning rate of α.
        weight_decay: Decay of the weight matrices; biases, norms and α have none.
        warmup_steps: Number of steps in which the rate rises; None: the share ``warmup`` of all steps.
        max_steps: Number of steps of the whole schedule; None: the number of steps of the trainer.
        label_smoothing: ε of the loss: the share of each training target that is spread evenly over all tokens.
        max_length: Longest output in tokens.
        seed: Determines the dropout of every epoch, independently of earlier random numbers.
        schedule: Schedule of the learning rate; see :func:`sparse_attn.recipes.seq2seq.schedules.rate_factor`.
        warmup: Share of all steps in which the rate rises.
        metrics: The metrics in addition to the loss; see ``recipes.seq2seq.metrics.METRICS``.
        bleu_tokenize: sacrebleu's method to split texts into words for BLEU.

    Raises:
        ValueError: If a number is outside its range, or the model refuses its arguments.
    """

    def __init__(
        self,
        *,
        source_tokenizer: dict[str, Any],
        target_tokenizer: dict[str, Any],
        model: dict[str, Any],
        learning_rate: float = 2e-3,
        alpha_learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int | None = None,
        max_steps: int | None = None,
        label_smoothing: float = 0.1,
        max_length: int = 64,
        seed: int = 0,
        schedule: str = "linear",
        warmup: float = 0.15,
        metrics: Sequence[str] = ("per", "wer"),
        bleu_tokenize: str = "13a",
    ) -> None:
        super().__init__()
        for name, rate in {
            "learning_rate": learning_rate,
            "alpha_learning_rate": alpha_learning_rate,
        }.items():
            if not rate > 0:
                raise ValueError(f"{name} must be above 0, got {rate}")
        check_schedule(schedule, warmup)
        for name, value in {"weight_decay": weight_decay, "warmup_steps": warmup_steps or 0}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or null, got {max_steps}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        # The tokenizers are too long for the hyper-parameters in a logger.
        self.save_hyperparameters(logger=False)
        self.source_tokenizer = Tokenizer(**source_tokenizer)
        self.target_tokenizer = Tokenizer(**target_tokenizer)
        sizes = (len(self.source_tokenizer), len(self.target_tokenizer))
        self.model = Seq2SeqTransformer(*sizes, feature_ids=self.source_tokenizer.feature_ids(), **model)
        self._scores = self.new_scores()

    def new_scores(self) -> Scores:
        """New, empty scores."""
        return Scores(
            names=self.hparams["metrics"],
            join=self.target_tokenizer.join,
            bleu_tokenize=self.hparams["bleu_tokenize"],
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the next target token, see ``Seq2SeqTransformer``."""
        logits: Tensor = self.model(source, target)
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the layout of the weights, so that a later version can check whether it can read them."""
        checkpoint["layout"] = LAYOUT

    def on_train_epoch_start(self) -> None:
        """Makes dropout a function of seed and epoch, so that a resumed run equals an uninterrupted run."""
        torch.manual_seed((self.global_rank << 52) + (self.hparams["seed"] << 20) + self.current_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss at the target tokens, without padding.

        Raises:
            ValueError: If the loss is not finite, since the training has diverged.
        """
        weight = 1.0
        if (processes := self._trainer.world_size if self._trainer else 1) > 1:
            batch, weight = share_of_batch(batch, self.global_rank, processes, PAD)
        logits = self(batch["source"], batch["target_in"])
        loss = weight * output_loss(
            logits.flatten(0, 1),
            batch["target_out"].flatten(),
            self.model.output_alpha,
            label_smoothing=self.hparams["label_smoothing"],
        )
        if not torch.isfinite(loss):
            raise ValueError(
                f"the training loss must be finite, got {loss.item()} at step {self.global_step + 1}; "
                f"a learning_rate below {self.hparams['learning_rate']}, or a weight_decay below "
                f"{self.hparams['weight_decay']}, may help"
            )
        size = len(batch["source"])
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Resets the scores."""
        self._scores = self.new_scores()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Predicts the words of a batch and scores them."""
        self.score_batch(batch, self._scores)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/loss``, ``val/support`` and the metrics, such as ``val/per`` and ``val/wer``."""
        for name, value in self._scores.metrics().items():
            self.log(f"val/{name}", value, prog_bar=name == self.hparams["metrics"][0])

    def score_batch(
        self, batch: dict[str, Any], scores: Scores, decode: Decode | None = None, *, losses: bool = True
    ) -> None:
        """Adds the words of an evaluation batch to ``scores``. The tensors of the batch are on the task's device.

        Args:
            batch: An evaluation batch.
            scores: The scores to which the words are added.
            decode: A function from source ids (N, S) to the target ids of each row; greedy decoding if not given.
            losses: Whether to compute loss and support of the model.
        """
        source, target = batch["source"], batch["target_out"]
        if losses:
            logits, real = self(source, batch["target_in"]).float()[target != PAD], target[target != PAD]
            scores.loss_sum += output_loss(logits, real, self.model.output_alpha, reduction="sum").item()
            possible = next_token_log_probabilities(logits, self.model.output_alpha) > -math.inf
            scores.support_sum += int(possible.sum())
            scores.tokens += len(real)
        scores.sources += batch["sources"]
        scores.predictions += self._decode(source) if decode is None else self._written(decode(source))
        scores.references += batch["references"]
        scores.groups += batch.get("groups") or [""] * len(source)

    @torch.no_grad()
    def predict_words(self, words: Sequence[str], *, batch_size: int = 512) -> list[list[str]]:
        """The target tokens of each word by greedy decoding; source tokens never seen in training are unknown."""
        return self.decode_words(words, self._decode, batch_size=batch_size)

    @torch.no_grad()
    def decode_words(
        self, words: Sequence[str], decode: Callable[[Tensor], Sequence[Decoded]], *, batch_size: int = 512
    ) -> list[Decoded]:
        """The result of ``decode`` for each word; ``decode`` takes the source ids (N, S) of several words."""
        rows = [self.source_tokenizer.encode(word) for word in words]
        lengths = [(len(row), 0) for row in rows]
        found: dict[int, Decoded] = {}
        for batch in BatchByLength(lengths, batch_size, batch_tokens=EVAL_BATCH_TOKENS, shuffle=False, seed=0):
            found.update(zip(batch, decode(pad([rows[index] for index in batch]).to(self.device)), strict=True))
        return [found[index] for index in range(len(rows))]

    def _decode(self, source: Tensor) -> list[list[str]]:
        return self._written(greedy_decode(self.model, source, max_length=self.hparams["max_length"]))

    def _written(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        tokenizer = self.target_tokenizer
        return [tokenizer.words(tokenizer.decode(row)) for row in rows]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with three parameter groups, and the schedule of the learning rate."""
        total = self.hparams["max_steps"]
        if total is None:
            total = int(self.trainer.estimated_stepping_batches)
        # Under mixed precision the fused step would scale the gradients itself, after they have been clipped.
        fused = self._trainer is None or "mixed" not in str(self._trainer.precision)
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=self.hparams["learning_rate"], betas=(0.9, 0.98), eps=1e-9, fused=fused
        )
        warmup, kind, dim = (
            self.warmup_steps(total),
            self.hparams["schedule"],
            self.model.target_embedding.tokens.embedding_dim,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, warmup, total, schedule=kind, dim=dim)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def warmup_steps(self, total: int) -> int:
        """The number of steps in which the learning rate rises, given the number of all steps."""
        given = self.hparams["warmup_steps"]
        return round(self.hparams["warmup"] * total) if given is None else int(given)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Three groups: weight matrices; biases and norms, without decay; α, with a separate learning rate."""
        rates = {"lr": self.hparams["learning_rate"], "alpha_lr": self.hparams["alpha_learning_rate"]}
        return alpha_param_groups(self.model, **rates, weight_decay=self.hparams["weight_decay"], strict=False)
