"""Train a model: ``sparse-attn train`` or ``python -m recipes.train``.

The way through it: the configuration becomes data, model and trainer, all checked before anything is written;
the run folder is begun, or continued from its last checkpoint; the best checkpoint is scored on all
validation and test words.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from .arguments import is_multirun
from .launch import Interrupted, config_dir, config_groups, reported, run_hydra
from .resume import check_continues, resume_arguments


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains, keeps everything in the run folder, and prints what was reached.

    Args:
        cfg: ``configs/train.yaml`` as composed by Hydra, with ``paths.output_dir`` as the run folder; if
            ``resume`` names a run folder, the training there goes on.

    Returns:
        ``val/loss``, ``val/per``, ``val/wer``, the same for ``test``, and ``seconds``, which counts the sessions
        before a resumption up to their last checkpoint.

    Raises:
        FileNotFoundError: If a file or checkpoint is missing.
        Interrupted: After Ctrl-C or SIGTERM; the message says how to go on.
        TypeError: If a value has the wrong type.
        ValueError: If a value or a file has a content that is not allowed.
    """
    begin = time.monotonic()
    # Here, because torch and Lightning take seconds to load: help and a mistyped key need not wait for them.
    import lightning as L
    import torch

    from .build import (
        build_callbacks,
        build_data,
        build_loggers,
        build_task,
        build_trainer,
        check_trainer,
        monitored,
        recorded,
        resolved,
    )
    from .fit import fit, quiet
    from .plan import plan_training
    from .run import checkpoint_file, continue_record, read_checkpoint, start_record
    from .summary import conclude, early_stop, farewell, headline

    settings = resolved(cfg)
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    folder = Path(settings["resume"] or settings["paths"]["output_dir"])
    last = checkpoint_file(folder, "last") if settings["resume"] else None
    state = read_checkpoint(last) if last else None
    step = state["global_step"] if state else 0
    with quiet():
        check_trainer(settings["trainer"])
        data = build_data(settings["data"])
        plan = plan_training(settings["trainer"], len(data.train_dataloader()))
        settings["trainer"]["max_epochs"] = plan.epochs
        monitor, higher_is_better = monitored(settings.get("monitor"), data)
        L.seed_everything(settings["seed"], verbose=False)
        task = build_task(settings, data)
        callbacks = build_callbacks(settings.get("callbacks"), monitor, higher_is_better)
        loggers = build_loggers(cfg, folder, step)
        trainer = build_trainer(
            settings["trainer"], loggers, folder, callbacks, monitor=monitor, higher_is_better=higher_is_better
        )
        record = recorded(cfg)
        record.trainer.max_epochs, record.monitor = plan.epochs, monitor
        if state:
            check_continues(state, task.hparams, trainer.max_epochs or 0)
            begin -= state["callbacks"]["BestAndLast"].get("seconds", 0.0)
        # Everything has been checked: only now does the run leave traces.
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        if last:
            continue_record(folder, record, overrides, step)
        else:
            start_record(folder, record, overrides)
        data.save_vocabularies(folder)
        print(headline(folder, data, task, trainer, step), flush=True)
        warmup = task.warmup_steps(task.hparams["max_steps"] or plan.updates)
        print(plan.describe(warmup), flush=True)
        for note in (*plan.notes(warmup), *data.notes()):
            print(f"note: {note}", flush=True)
        try:
            fit(trainer, task, data, last)
            if stopped := early_stop(trainer):
                print(stopped, flush=True)
            return conclude(folder, task, data, device=trainer.strategy.root_device, begin=begin)
        except KeyboardInterrupt:
            raise Interrupted(farewell(folder)) from None


def check_groups(arguments: Sequence[str]) -> None:
    """Refuses ``GROUP=null``, on which Hydra fails with a traceback.

    Raises:
        ValueError: If a group is chosen to be nothing.
    """
    for argument in arguments:
        group, _, option = argument.partition("=")
        if option == "null" and group in config_groups():
            options = sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))
            raise ValueError(f"{group} must be one of {', '.join(options)}, got null")


def main() -> None:
    """The command; several runs are compared at the end."""
    with reported("train"):
        arguments, config = resume_arguments(sys.argv[1:])
        check_groups(arguments)
    finished: list[tuple[list[str], dict[str, float]]] = []

    @functools.wraps(train)
    def kept(cfg: DictConfig) -> None:
        changes = list(HydraConfig.get().overrides.task)
        if is_multirun(arguments):
            print(f"\nrun {len(finished)}: {' '.join(changes)}", flush=True)
        finished.append((changes, train(cfg)))

    run_hydra("train", kept, arguments=arguments, config=config)
    if is_multirun(arguments):
        from .summary import print_comparison

        print_comparison(finished)


if __name__ == "__main__":
    main()
