"""The program ``sparse-attn``: finds the subcommand and runs it."""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

COMMANDS = {
    "train": "train a model and print its scores and the α of every head",
    "evaluate": "print scores of a trained model",
    "predict": "print outputs of a trained model for words from a file or standard input",
    "compare": "print a table of runs: mean and standard deviation over seeds, differences from a baseline",
    "inspect": "write α and attention density of every head of a trained model as tables and plots",
    "calibrate": "choose α of every head of a dense Hugging Face model, for a density or a bounded loss",
}
USAGE = """\
usage: sparse-attn COMMAND [key=value ...]

{commands}

examples
  sparse-attn train                                          words to phones on CMUdict, no download
  sparse-attn train model.attention=softmax trainer.max_epochs=2
  sparse-attn train -m model.attention=softmax,entmax15,adaptive
  sparse-attn train resume=runs/DATE_TIME                    continue an interrupted training
  sparse-attn evaluate run=runs/DATE_TIME
  echo attention | sparse-attn predict run=runs/DATE_TIME
  sparse-attn inspect run=runs/DATE_TIME
  sparse-attn calibrate model=DIR text=FILE density=0.2

sparse-attn COMMAND -h lists the keys of a command; sparse-attn --version prints the version.
"""
_NEEDED = ("lightning", "hydra", "rich", "rapidfuzz")


def usage() -> str:
    """The text that ``sparse-attn -h`` prints."""
    return USAGE.format(commands="\n".join(f"  {name:<9} {purpose}" for name, purpose in COMMANDS.items()))


def main() -> None:
    """Runs ``sparse-attn COMMAND ...``.

    Raises:
        SystemExit: After the usage text, a wrong input or an interruption.
    """
    if os.name == "posix" and sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        # With LC_ALL=C and PYTHONUTF8=0, words and paths of the command line could not be decoded as text. The process
        # starts again in UTF-8 mode.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if hasattr(sys.stdout, "reconfigure"):
        # The encoding of a terminal may lack α. Standard error replaces such characters by default.
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if arguments else 2)
    try:
        _start(*arguments)
    except KeyboardInterrupt:
        # Ctrl-C came during the import of torch, which takes seconds. Later, the command handles the interruption.
        if os.environ.get("SPARSE_ATTN_TRACEBACK") == "1":
            raise
        _refuse(f"sparse-attn {arguments[0]}: stopped", status=130)


def _start(command: str, *rest: str) -> None:
    if command == "--version":
        from sparse_attn import __version__

        print(f"sparse-attn {__version__}")
        return
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        question = f", did you mean {close[0]!r}?" if close else ""
        _refuse(f"sparse-attn: unknown command {command!r}{question}; allowed: {', '.join(COMMANDS)}, -h, --version")
    if any(find_spec(package) is None for package in _NEEDED):
        _refuse(
            f'sparse-attn: {command} needs packages that are not installed; run: pip install "sparse-attn[recipes]"'
        )
    sys.argv = [sys.argv[0], *rest]
    if command == "train":
        importlib.import_module(".train", __package__).main()
    else:
        from .arguments import sweep_arguments
        from .launch import run_hydra

        # The command's module loads torch. Help texts and errors about mistyped keys should not wait for that.
        def task(cfg: Any) -> Any:
            return getattr(importlib.import_module(f".{command}", __package__), command)(cfg)

        run_hydra(command, task, arguments=sweep_arguments(rest) if command == "compare" else None)


def _refuse(message: str, status: int = 2) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
