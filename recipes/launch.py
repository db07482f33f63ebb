"""The start of every command: Hydra composes the configuration, and a wrong input is reported in one line.

Hydra's own report of an error has several lines, with internals of the program. ``run_hydra`` obtains the exception
from Hydra instead, and prints on standard error:

- for an error that a user can correct, one line (exit status 2);
- for an interruption, one line (exit status 130), which also says how to continue a training;
- for any other error, which is a bug, Python's traceback.

``SPARSE_ATTN_TRACEBACK=1`` shows the traceback of every error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from .arguments import check_flags, check_overrides, is_multirun, quoted, read_as_text, split, with_config_names
from .folders import remove_if_empty

WRONG_INPUT, INTERRUPTED = 2, 130
_OURS = ("recipes", "sparse_attn", "__main__")

# Groups to which other packages can add options.
_PLUGGED = ("hydra/launcher", "hydra/sweeper")

_NO_EXPERIMENT = ("experiment", "null")

# Descriptions of values without a default, for the message that a value is missing.
MANDATORY = {
    "data.path": "DIR, the folder of the data files",
    "data.language": "CODE, the language of the data files, such as hun",
    "run": "DIR, the run folder of a training",
    "sweep": "DIR, a folder that holds run folders",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a message that says what has been saved and how to continue."""


def config_dir() -> Path:
    """The folder of the YAML files: beside this file in a wheel, at the top level in a checkout."""
    here = Path(__file__).resolve().parent
    packed = here / "_configs"
    return packed if packed.is_dir() else here.parent / "configs"


def config_options(group: str) -> list[str]:
    """Names of the options of a config group, such as ``base`` and ``small`` of ``model``."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


def config_groups() -> list[str]:
    """Names of the config groups, such as ``model`` in ``model=small``."""
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir() and path.name != "hydra")


def run_hydra(
    name: str,
    task: Callable[[DictConfig], Any],
    *,
    arguments: Sequence[str] | None = None,
    config: Path | None = None,
) -> None:
    """Composes the configuration of a command and calls ``task`` with it; with ``-m``, for every combination of values.

    Args:
        name: The command; ``configs/{name}.yaml`` is its configuration.
        task: The function that is called with the composed configuration.
        arguments: The command line after the command; by default the command line of this process.
        config: A YAML file to use instead, such as the ``config.yaml`` of a run folder.

    Raises:
        SystemExit: With status 2 after a wrong input or 130 after an interruption, each with a one-line message on
            standard error; with status 1 if the reader of standard output has closed the pipe.
    """
    # A relative config path does not work for a console script.
    folder, config_name = (config.parent, config.stem) if config else (config_dir(), name)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with reported(name), contextlib.ExitStack() as stack:
        flags, overrides = split(arguments)
        check_flags(flags)
        check_overrides(overrides)
        if config is None:
            check_groups(name, overrides, sweep=is_multirun(flags))
        overrides = with_config_names(name, overrides)
        overrides = [read_as_text(override, sweep=is_multirun(flags)) for override in overrides]
        if name != "train" and is_multirun(flags):
            # The sweeper writes a record of its runs; only a training has a folder for this record.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            overrides.append(f"hydra.sweep.dir={quoted(scratch)}")
        program, typed = _program(name), sys.argv[1:]
        main = hydra.main(config_path=str(folder.resolve()), config_name=config_name, version_base="1.3")
        try:
            # The flags come last: Hydra's parser does not accept override, flag, override in this order.
            with _arguments([f"sparse-attn {name}", *overrides, *flags]), _unchecked_help_texts():
                main(_through_hydra(task, program, typed))()
        except _TaskError as carrier:
            raise carrier.error from carrier.error.__cause__
        except (HydraException, OmegaConfBaseException, OSError):
            raise
        except Exception as error:
            # Errors of the task are wrapped in a _TaskError. This error is Hydra's own, for an impossible value of a
            # group or key.
            raise ValueError(f"the command line cannot be composed: {error}") from error


def check_groups(command: str, overrides: Sequence[str], *, sweep: bool = False) -> None:
    """Refuses options that no group has, such as ``GROUP=null`` or a number: Hydra itself would fail on these options.

    Args:
        command: The command, whose configuration says which groups are chosen as a whole.
        overrides: The command line without flags.
        sweep: Whether commas separate several values.

    Raises:
        ValueError: If a group is given null, true, false, a number or nothing; ``experiment=null`` is allowed.
    """
    defaults = OmegaConf.load(config_dir() / f"{command}.yaml").defaults
    chosen = [group for default in defaults if not isinstance(default, str) for group in default]
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if not equals or group not in config_groups():
            continue
        for option in (option.strip(" '\"") for option in (value.split(",") if sweep else [value])):
            if not re.fullmatch(r"(null|true|false|[-+.\d]+)?", option, re.IGNORECASE):
                continue  # for an unknown word, Hydra's own error lists the options
            if group not in chosen:
                raise ValueError(f"{group} must be given key by key, as {group}.KEY=VALUE, got {override}")
            if (group, option) != _NO_EXPERIMENT:
                allowed = ", ".join(config_options(group))
                raise ValueError(f"{group} must be one of {allowed}, got {option or 'nothing'}")


@contextlib.contextmanager
def reported(name: str) -> Any:
    """Turns errors of the block that a user can correct into one line and an exit status.

    Raises:
        SystemExit: In place of such an error or of an interruption.
    """
    _open_standard_streams()
    # With this variable, Hydra raises its errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has closed it. Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        _stop(name, error, str(error) or "stopped", INTERRUPTED)
    except Exception as error:
        message = explained(error, name)
        if message is None:
            raise
        _stop(name, error, message, WRONG_INPUT)


def _open_standard_streams() -> None:
    """Replaces standard output and standard error by the null device if they are closed, as after ``>&-``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 until the process ends


def _stop(name: str, error: BaseException, message: str, status: int) -> NoReturn:
    if os.environ.get("SPARSE_ATTN_TRACEBACK") == "1":
        raise error
    print(f"sparse-attn {name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


class _TaskError(BaseException):
    """Wraps an error of the task, since Hydra would print its own message for an ``Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _through_hydra(task: Callable[[DictConfig], Any], program: list[str], typed: list[str]) -> Callable[..., Any]:
    """The function that Hydra calls. During the task, ``sys.argv`` is the command line for processes of Lightning."""

    @functools.wraps(task)
    def carried(cfg: DictConfig) -> Any:
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        # In a multirun, the processes that Lightning starts take part in one run only.
        arguments = list(hydra.overrides.task) if hydra.mode == RunMode.MULTIRUN else typed
        try:
            with _arguments([*program, *arguments]):
                return task(cfg)
        except Exception as error:
            raise _TaskError(error) from error
        finally:
            # Hydra created the folder before the task checked its input.
            if folder != Path.cwd():
                remove_if_empty(folder)

    return carried


def _program(name: str) -> list[str]:
    """The command line that started the program: the script sparse-attn, or ``python -m recipes.NAME``."""
    by_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return [sys.argv[0], *([] if by_module else [name])]


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Any:
    """Replaces ``sys.argv``, since Hydra reads no other command line."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _unchecked_help_texts() -> Any:
    """Turns off Python 3.14's check of help texts: one help text in Hydra 1.3 is not a string."""
    argparse.ArgumentParser._check_help = lambda parser, action: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del argparse.ArgumentParser._check_help  # type: ignore[attr-defined]


def explained(error: Exception, name: str) -> str | None:
    """The message for the user, or ``None`` for a bug."""
    if isinstance(error, HydraException):
        return _composition_message(error, name)
    if isinstance(error, OmegaConfBaseException):
        # Reading a missing key is a bug of the program: Hydra has already refused unknown keys of the user.
        return None if isinstance(error, ConfigAttributeError | ConfigKeyError) else _config_message(error, name)
    if isinstance(error, OSError) or (isinstance(error, ValueError | TypeError) and _is_ours(error)):
        return str(error)
    return None


def _is_ours(error: Exception) -> bool:
    """Whether this project's code raised the error. An error raised by torch or Lightning counts as a bug."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in _OURS


def _composition_message(error: HydraException, name: str) -> str:
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        extra = '; more come with pip install "sparse-attn[sweep]"' if group in _PLUGGED else ""
        return f"unknown {group} {option!r}{_allowed(option, error.options)}{extra}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _config_message(cause, name)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    return str(error)


def _unreadable(override: str) -> str:
    """The message for an override that Hydra's parser refuses."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\+{0,2}[\w.@/-]+", key):
        return f"{override!r} is not of the form key=value"
    key = key.lstrip("+")
    return (
        f"the value of {key} cannot be read, got {value!r}; close brackets and quotation marks, and put a text with "
        f"special characters into both kinds of quotation marks: {key}=\"'TEXT'\""
    )


def _config_message(error: OmegaConfBaseException, name: str) -> str:
    if isinstance(error, MissingMandatoryValue):
        return _missing(error.full_key or str(error.key))
    if isinstance(error, InterpolationToMissingValueError):
        return _missing(str(error).partition("Missing mandatory value:")[2].split()[0])
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        key = error.full_key or str(error.key)
        level, _, last = key.rpartition(".")
        names = [str(known) for known in error.parent_node or () if known != "hydra"]
        if not level and name == "train":
            names = sorted({*names, *config_groups()})
        elif level and not names:
            return f"{key!r} cannot be set: {level} is a value, not a group of keys"
        return f"unknown key {key!r}{_allowed(last, names, level)}"
    return str(error).splitlines()[0]


def _missing(key: str) -> str:
    return f"{key} has no value; give it as {key}={MANDATORY.get(key, 'VALUE')}"


def _allowed(name: str, options: Sequence[str], level: str = "") -> str:
    close = get_close_matches(name, options, n=1)
    question = f", did you mean {close[0]!r}?" if close else ""
    return f"{question}; allowed{f' in {level}' if level else ''}: {', '.join(options) or 'nothing'}"
