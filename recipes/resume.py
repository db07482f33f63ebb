"""How ``resume=DIR`` turns into a command line for Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.launch import config_groups, is_multirun


def resume_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line to compose from, and the config file of the run that is continued.

    Without ``resume=DIR`` nothing changes. With it the run's own ``config.yaml`` replaces the one of the
    command, so that the other arguments override what the run was started with.

    Raises:
        FileNotFoundError: If ``DIR`` is not a run folder or has no last checkpoint.
        ValueError: If several runs are asked for, a config group is chosen, or the checkpoint is damaged.
    """
    runs = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if not runs or runs[-1] in ("", "null"):
        return list(arguments), None
    # Here, because it loads torch: a run that starts anew need not wait for it yet.
    from recipes.run import CONFIG, checkpoint_file, read_checkpoint, run_folder

    others = [argument for argument in arguments if not argument.startswith("resume=")]
    if is_multirun(others):
        raise ValueError("resume continues one run; it cannot be combined with -m")
    for argument in others:
        key = argument.partition("=")[0].lstrip("+~")
        if "/" in key or "@" in key or key in config_groups():
            raise ValueError(
                f"resume continues a run with its own configuration: {argument!r} chooses a group; "
                "allowed are single keys such as trainer.max_epochs=8"
            )
    folder = run_folder(runs[-1].strip("'\""))
    read_checkpoint(checkpoint_file(folder, "last"))
    place = quoted(str(folder))
    own = [
        f"resume={place}",
        f"paths.output_dir={place}",
        f"hydra.run.dir={place}",
        "hydra.output_subdir=null",
    ]
    return [*others, *own, "hydra/job_logging=none", "hydra/hydra_logging=none"], folder / CONFIG


def quoted(text: str) -> str:
    r"""Text as a value that Hydra reads as it is.

    Example:
        >>> quoted("it's = 1")
        "'it\\'s = 1'"
    """
    return "'" + text.replace("'", "\\'") + "'"
