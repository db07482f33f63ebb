"""Train a model: ``sparse-attn train`` or ``python -m recipes.train``.

The way through it: the configuration becomes data, model and trainer, all checked before anything is written;
the run folder is begun, or continued from its last checkpoint; the best checkpoint is scored on all
validation and test words.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .arguments import asks_for_help, is_multirun
from .folders import claimed, is_disk_full
from .launch import Interrupted, config_dir, config_groups, reported, run_hydra
from .resume import check_continues, resume_arguments
from .sweep import sweep


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
        FileExistsError: If the folder holds another run, or another process is at work in it.
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
        build_decoding,
        build_loggers,
        build_task,
        build_trainer,
        recorded,
        resolved,
    )
    from .fit import fit, quiet
    from .run import checkpoint_file, continue_record, read_checkpoint, refuse_taken, start_record
    from .summary import conclude, farewell, headline

    settings = resolved(cfg)
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    folder = Path(settings["resume"] or settings["paths"]["output_dir"])
    last = checkpoint_file(folder, "last") if settings["resume"] else None
    with claimed(folder, fixed=bool(last) or not _is_named_by_time(folder)) as folder, quiet():
        cfg.paths.output_dir = str(folder)
        if not last:
            refuse_taken(folder)
        state = read_checkpoint(last) if last else None
        step = state["global_step"] if state else 0
        data = build_data(settings["data"])
        L.seed_everything(settings["seed"], verbose=False)
        task = build_task(settings, data)
        callbacks = build_callbacks(settings.get("callbacks"))
        decoding = build_decoding(settings.get("decoding"))
        loggers = build_loggers(cfg, folder, step)
        trainer = build_trainer(settings["trainer"], loggers, folder, callbacks, settings["keep_checkpoints"])
        if state:
            check_continues(state, task.hparams, trainer.max_epochs or 0)
            begin -= state["callbacks"]["BestAndLast"].get("seconds", 0.0)
        # Everything has been checked: only now does the run leave traces.
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        if last:
            continue_record(folder, recorded(cfg), overrides, step)
        else:
            start_record(folder, recorded(cfg), overrides)
        data.save_vocabularies(folder)
        print(headline(folder, data, task, trainer, step), flush=True)
        for note in data.notes():
            print(f"note: {note}", flush=True)
        try:
            fit(trainer, task, data, last)
            return conclude(folder, task, data, decoding, device=trainer.strategy.root_device, begin=begin)
        except KeyboardInterrupt:
            raise Interrupted(farewell(folder)) from None
        except OSError as error:
            if is_disk_full(error):
                raise OSError(error.errno, f"{error.strerror}: {error.filename}; {farewell(folder)}") from error
            raise


def _is_named_by_time(folder: Path) -> bool:
    """Whether Hydra chose the name of a run folder, in which case another name does as well."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return False
    chosen = OmegaConf.to_container(HydraConfig.get().run, resolve=False)
    return folder == Path(HydraConfig.get().runtime.output_dir) and "${now:" in str(chosen)


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
    """The command."""
    with reported("train"):
        arguments, config = resume_arguments(sys.argv[1:])
        check_groups(arguments)
    if is_multirun(arguments) and not asks_for_help(arguments):
        sweep(arguments)
    else:
        run_hydra("train", train, arguments=arguments, config=config)


if __name__ == "__main__":
    main()
