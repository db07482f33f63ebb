"""A schedule of α over the optimizer steps, from dense attention to sparse or back."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparse_attn.optim import FilterFn, check_set_alpha, linear_alpha, of_attention, set_alpha


class AlphaSchedule(L.Callback):
    """Changes α, learnt or fixed, linearly between two optimizer steps; by default, only α of attention.

    A learnt α follows the line up to ``last_step`` and is trained from then on. The callback works with
    any LightningModule.

    Args:
        start: α up to ``first_step``.
        end: α at ``last_step``; a fixed α keeps this value afterwards.
        first_step: Optimizer step at which the line begins.
        last_step: Optimizer step at which the line ends, above ``first_step``.
        filter_fn: Called with the name and module of each α; α changes only if the result is True. By default, it
            selects attention layers. None selects every α, also that of a loss, which changes the training objective.

    Raises:
        TypeError: A step or an α is not a number.
        ValueError: At once, if α is outside ``(0, inf)`` or ``last_step`` is not above ``first_step``. When a training
            starts, if the model has no α that ``filter_fn`` accepts, or ``start`` or ``end`` is outside the range of a
            learnt α; then no α is changed.
    """

    def __init__(
        self,
        *,
        start: float = 1.0,
        end: float = 1.5,
        first_step: int = 0,
        last_step: int,
        filter_fn: FilterFn | None = of_attention,
    ) -> None:
        self.start, self.end, self.first_step, self.last_step = start, end, first_step, last_step
        self.filter_fn = filter_fn
        self.alpha(0)  # raises for invalid arguments

    def alpha(self, step: int) -> float:
        """α of an optimizer step."""
        return linear_alpha(step, self.start, self.end, first_step=self.first_step, last_step=self.last_step)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sets the first value; an α that is a number becomes a buffer before anything is compiled or loaded."""
        if stage == "fit" and not is_overridden("configure_model", pl_module):  # configure_model builds the model later
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets the value of the first step of a new or resumed training."""
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Stores the step before the batch.

        With several optimizers, a batch has several steps: a batch that begins before ``last_step`` may end after it,
        and α must still be set to ``end``.
        """
        self._began = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Sets the value of the next step, which a validation uses too."""
        if self._began < self.last_step:
            self._set(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for alpha in (self.start, self.end):  # raises now, not at the end of the line
            check_set_alpha(pl_module, alpha, filter_fn=self.filter_fn)
        if trainer.global_step <= self.last_step:  # after the line, α keeps its last or learnt value
            self._set(trainer, pl_module)

    def _set(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        set_alpha(pl_module, self.alpha(trainer.global_step), filter_fn=self.filter_fn)
