"""Train a model: ``sparse-attn train`` or ``python -m recipes.train``.

1. Build data, model and trainer from the configuration, and check them before any file of the run is written.
2. Train the model from the start, or from the last checkpoint of a run.
3. Score the best checkpoint on all validation and test words.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .arguments import asks_for_help, is_multirun
from .folders import claimed, is_disk_full
from .launch import Interrupted, reported, run_hydra
from .processes import FOLDER, is_one_of_several, rank, set_environment
from .resume import check_continues, check_weights, resume_arguments
from .sweep import sweep


def train(cfg: DictConfig) -> dict[str, float]:
    """Trains, writes all results to the run folder, and prints the scores.

    Args:
        cfg: ``configs/train.yaml``, composed by Hydra, with ``paths.output_dir`` as the run folder; a folder whose
            name is the time gets a number if it is taken. If ``resume`` names a run folder, its training is continued.

    Returns:
        ``val/loss``, ``val/support`` and the metrics of the data, such as ``val/per`` and ``val/wer``; the same for
        ``test``; and ``seconds``, which includes earlier sessions up to their last checkpoint. If several processes
        train together, only the first one returns these values.

    Raises:
        FileNotFoundError: If a file or checkpoint is missing.
        FileExistsError: If the folder contains another run, or another process uses it.
        Interrupted: After Ctrl-C if the record of the run has been written, or after SIGTERM during the epochs; the
            message says how to continue.
        omegaconf.errors.MissingMandatoryValue: If a value without a default is not given.
        OSError: If a file cannot be written; if the disk is full, the message says how to continue.
        TypeError: If a value has the wrong type.
        ValueError: If a value or the content of a file is not allowed.
    """
    begin = time.monotonic()
    # Imported here, since these modules take seconds: help texts or errors about a key should not wait for them.
    import lightning as L
    import torch

    from .build import (
        build_callbacks,
        build_data,
        build_decoding,
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
    last = checkpoint_file(Path(settings["resume"]), "last") if settings["resume"] else None
    with _held(settings, named_by_time=_is_named_by_time(settings["paths"]["output_dir"])) as folder, quiet():
        cfg.paths.output_dir = str(folder)
        state = read_checkpoint(last) if last else None
        step = state["global_step"] if state else 0
        check_trainer(settings["trainer"])
        data = build_data(settings["data"])
        plan = plan_training(settings["trainer"], len(data.train_dataloader()))
        settings["trainer"]["max_epochs"] = plan.epochs
        monitor, higher_is_better = monitored(settings.get("monitor"), data)
        L.seed_everything(settings["seed"], verbose=False)
        task = build_task(settings, data)
        callbacks = build_callbacks(settings.get("callbacks"), monitor, higher_is_better)
        decoding = build_decoding(settings.get("decoding"))
        loggers = build_loggers(cfg, folder, step)
        trainer = build_trainer(
            settings["trainer"],
            loggers,
            folder,
            callbacks,
            monitor=monitor,
            higher_is_better=higher_is_better,
            keep_checkpoints=settings["keep_checkpoints"],
        )
        record = recorded(cfg)
        record.trainer.max_epochs, record.monitor = plan.epochs, monitor
        if state and last:
            check_continues(state, task.hparams, trainer.max_epochs or 0)
            check_weights(state, task.state_dict(), last)
            begin -= state["callbacks"]["BestAndLast"].get("seconds", 0.0)
        if not trainer.is_global_zero:
            fit(trainer, task, data, last)
            return {}
        # All checks are done: files are written only from here on.
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
            with set_environment(FOLDER, str(folder)):
                fit(trainer, task, data, last)
            if stopped := early_stop(trainer):
                print(stopped, flush=True)
            return conclude(folder, task, data, decoding, device=trainer.strategy.root_device, begin=begin)
        except KeyboardInterrupt:
            raise Interrupted(farewell(folder)) from None
        except OSError as error:
            if is_disk_full(error):
                raise OSError(error.errno, f"{error.strerror}: {error.filename}; {farewell(folder)}") from error
            raise


@contextlib.contextmanager
def _held(settings: dict[str, Any], *, named_by_time: bool) -> Iterator[Path]:
    """The run folder, locked by the first of the processes that train together."""
    from .run import refuse_taken

    folder = Path(settings["resume"] or settings["paths"]["output_dir"])
    if FOLDER in os.environ:  # Lightning started this process
        yield Path(os.environ[FOLDER])
    elif is_one_of_several() and named_by_time and not settings["resume"]:
        raise ValueError("hydra.run.dir must be given where torchrun or srun starts several processes")
    elif rank() > 0:
        yield folder
    else:
        with claimed(folder, fixed=not named_by_time or bool(settings["resume"])) as own:
            if not settings["resume"]:
                refuse_taken(own)
            yield own


def _is_named_by_time(folder: str) -> bool:
    """Whether Hydra made the name of a run folder from the time, so that another name may be used instead."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN or OmegaConf.is_missing(hydra.runtime, "output_dir"):
        return False
    return folder == hydra.runtime.output_dir and "${now:" in str(OmegaConf.to_container(hydra.run, resolve=False))


def main() -> None:
    """Runs ``sparse-attn train``."""
    with reported("train"):
        arguments, config = resume_arguments(sys.argv[1:])
    if is_multirun(arguments) and not asks_for_help(arguments):
        sweep(arguments)
    else:
        run_hydra("train", train, arguments=arguments, config=config)


if __name__ == "__main__":
    main()
