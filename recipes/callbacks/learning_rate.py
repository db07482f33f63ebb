"""Logs the learning rate, and corrects it when a resumed training has another schedule than before."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from torch.optim.lr_scheduler import LambdaLR

KEY = "train/learning_rate"


class LearningRate(L.Callback):
    """Logs ``train/learning_rate``: the learning rate of each update, for the first group of parameters (the weights).

    A training that is resumed with another length has another schedule. The first step then uses the rate of the
    new schedule, and a message reports the change.
    """

    _rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets the learning rates of the current schedule if those in the checkpoint differ, and reports the change."""
        for config in trainer.lr_scheduler_configs:
            scheduler = cast(LambdaLR, config.scheduler)
            groups = scheduler.optimizer.param_groups
            before = [group["lr"] for group in groups]
            now = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            if any(abs(new - old) > 1e-6 * max(abs(new), abs(old)) for new, old in zip(now, before, strict=True)):
                for group, rate in zip(groups, now, strict=True):
                    group["lr"] = rate
                if trainer.is_global_zero:
                    print(
                        "the schedule ends at another step than before: the learning rate continues at "
                        f"{now[0]:.2e}, after {before[0]:.2e}",
                        flush=True,
                    )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Logs the rate of the next update, if Lightning logs this update."""
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]
        pl_module.log(KEY, self._rate, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the rate of the last update: an epoch may have fewer updates than ``trainer.log_every_n_steps``."""
        pl_module.log(KEY, self._rate, on_step=False, on_epoch=True)
