"""The length of a training: epochs, updates and warm-up, computed before the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# The shortest training if no number of epochs is given: long enough for a data set of a few hundred words.
FEWEST_EPOCHS, FEWEST_UPDATES = 5, 1500


@dataclass(frozen=True)
class Plan:
    """The length of a training.

    Attributes:
        epochs: Number of epochs.
        batches: Batches per epoch.
        all_batches: Batches that the data contain.
        updates: Number of all updates of the weights.
    """

    epochs: int
    batches: int
    all_batches: int
    updates: int

    def describe(self, warmup: int) -> str:
        """The plan in one line.

        Example:
            >>> Plan(5, 280, 1804, 1400).describe(210)
            '5 epochs of 280 of 1,804 batches (trainer.limit_train_batches): 1,400 updates, 210 of them warm-up'
        """
        of = f" of {self.all_batches:,}" if self.batches < self.all_batches else ""
        limit = " (trainer.limit_train_batches)" if of else ""
        epochs = f"{self.epochs:,} epoch{'s' * (self.epochs != 1)}"
        return f"{epochs} of {self.batches:,}{of} batches{limit}: {self.updates:,} updates, {warmup:,} of them warm-up"

    def notes(self, warmup: int) -> list[str]:
        """Warnings about the plan.

        Example:
            >>> Plan(5, 13, 13, 65).notes(200)[0]
            "the warm-up of 200 updates is more than half of this training's 65 updates (optimizer.warmup_steps)"
        """
        if warmup <= self.updates / 2:
            return []
        return [
            f"the warm-up of {warmup:,} updates is more than half of this training's {self.updates:,} updates "
            "(optimizer.warmup_steps)"
        ]


def plan_training(trainer: dict[str, Any], batches: int) -> Plan:
    """The length of a training with these settings.

    Args:
        trainer: The ``trainer`` section. Without ``max_epochs`` and ``max_steps`` there are at least
            ``FEWEST_EPOCHS`` epochs and ``FEWEST_UPDATES`` updates.
        batches: Batches that the training data have.

    Example:
        >>> plan_training({"max_epochs": None}, 13)
        Plan(epochs=116, batches=13, all_batches=13, updates=1508)
    """
    limit = trainer.get("limit_train_batches")
    used = batches if limit is None else min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    updates = max(1, math.ceil(used / max(1, trainer.get("accumulate_grad_batches") or 1)))
    steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    most = math.inf if steps is None or steps < 0 else steps
    if epochs is None:
        epochs = math.ceil((max(FEWEST_EPOCHS * updates, FEWEST_UPDATES) if most == math.inf else most) / updates)
    return Plan(epochs, used, batches, int(min(epochs * updates, most)))
