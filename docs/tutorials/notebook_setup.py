"""Settings that the first, hidden cell of every tutorial applies, so that a page can show its outputs."""

import logging
import os
import subprocess
import sys
import warnings

from IPython import get_ipython

shell = get_ipython()
shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg"]')
warnings.filterwarnings("ignore", "IProgress not found")  # tqdm warns that it cannot draw a widget
logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
os.environ["COLUMNS"] = "90"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):  # the kernel sets them; a page cannot show terminal colours
    os.environ.pop(name, None)


def bash(line: str, cell: str) -> None:
    """The magic ``%%bash``, which prints the output of all commands in one piece at the end.

    IPython's own magic prints the output in pieces of 100 characters.

    Raises:
        RuntimeError: A command failed.
    """
    done = subprocess.run(["bash", "-ec", cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"a command ended with status {done.returncode}")


shell.register_magic_function(bash, "cell")
