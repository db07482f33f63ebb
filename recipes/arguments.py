"""Checks the command line and prepares it for Hydra: flags may be anywhere, and paths and words are taken literally."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Keys whose value is text, such as a path or a word; Hydra might read the value as a number, a list or a function call.
_TEXTS = [
    "run",
    "compare",
    "baseline",
    "input",
    "output",
    "word",
    "words",
    "hf_model",
    "text",
    "target",
    "alignments",
    "state",
    "save",
    "resume",
    "data.path",
    "data.train",
    "data.val",
    "data.test",
    "hydra.run.dir",
    "hydra.sweep.dir",
]
# Keys of _TEXTS that also take a list.
_LISTED = ("run", "words")
# Keys that have another name in the config: `model` is also a config group, so Hydra would look for one of its files.
_OTHER_NAMES = {"inspect": {"model": "hf_model"}, "calibrate": {"model": "hf_model"}}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle)\(.*\)")
_NEEDED_GROUPS = ("data", "decoding", "model", "paths", "trainer")
_HELP, _MULTIRUN = ("--help", "-h"), ("--multirun", "-m")
# Flags that choose what Hydra does. Hydra accepts only one of them.
_MODES = (*_MULTIRUN, "--run", "-r", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
_WITH_VALUE = [
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--experimental-rerun",
]
_INFOS = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
_FLAGS = tuple(dict.fromkeys([*_HELP, *_MODES, *_WITH_VALUE, "--resolve", "--hydra-help", "--version"]))


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for several runs."""
    return any(argument in _MULTIRUN for argument in arguments)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for the help instead of a run."""
    return any(argument in (*_HELP, "--hydra-help") for argument in arguments)


def quoted(text: str) -> str:
    r"""The text quoted, so that Hydra and OmegaConf read it unchanged.

    Example:
        >>> quoted("it's = 1")
        "'it\\'s = 1'"
    """
    # A backslash is special before ${ for OmegaConf, and before a quote for Hydra.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), text) + "'"


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags and the overrides. The value of a flag, if there is one, comes after the flag."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    before = ""
    for argument in rest:
        is_value = before in _WITH_VALUE or (before in ("--info", "-i") and argument in _INFOS)
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
        before = "" if is_value else argument
    return flags, overrides


def sweep_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of ``compare``, with the key ``sweep`` before folders that were given without a key.

    Example:
        >>> sweep_arguments(["runs/a", "runs/b", "format=csv"])
        ["sweep=['runs/a','runs/b']", 'format=csv']
    """
    flags, others = split(arguments)
    folders = [argument for argument in others if "=" not in argument]
    given = [f"sweep=[{','.join(map(quoted, folders))}]"] if folders else []
    return [*given, *(argument for argument in others if argument not in folders), *flags]


def check_flags(flags: Sequence[str]) -> None:
    """Raise a one-line error for flags, or combinations of flags, for which Hydra would print a long usage message."""
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("-")]
    for flag, name in zip((flag for flag in flags if flag.startswith("-")), names, strict=True):
        if name not in _FLAGS:
            raise ValueError(f"unknown option {flag!r}; allowed: {', '.join(_FLAGS)} and key=value")
    modes = [name for name in names if name in _MODES]
    if len(modes) > 1:
        raise ValueError(f"at most one of {', '.join(_MODES)} can be given, got {' '.join(modes)}")
    if "--resolve" in names and not {"--cfg", "-c", *_HELP} & set(names):
        raise ValueError(f"--resolve can only be given with --cfg or --help, got {' '.join(names)}")


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise if an override has no key, or deletes a required config group."""
    for override in overrides:
        if override.startswith("="):
            raise ValueError(f"{override!r} is not of the form key=value")
        group = override.partition("=")[0].removeprefix("~")
        if override.startswith("~") and group in _NEEDED_GROUPS:
            raise ValueError(f"{group} cannot be left out, got {override!r}; choose one with {group}=NAME")


def with_config_names(command: str, overrides: Sequence[str]) -> list[str]:
    """The overrides, with the names that keys have in the configuration instead of the names that a user types.

    Example:
        >>> with_config_names("inspect", ["model=a=b", "run=c"])
        ['hf_model=a=b', 'run=c']
    """
    names = _OTHER_NAMES.get(command, {})
    keys = [override.partition("=") for override in overrides]
    return [names.get(key, key) + equals + value for key, equals, value in keys]


def read_as_text(override: str, *, sweep: bool) -> str:
    """The override, with a quoted value if its key takes text; with ``sweep``, commas separate several values."""
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in _TEXTS or (sweep and _SWEEP_FUNCTION.fullmatch(value)):
        return override
    listed = re.fullmatch(r"\[(.*)\]", value) if key in _LISTED else None
    if listed:  # the list is one value
        items = _separated(listed[1]) if listed[1].strip() else []
        return f"{key}=[{','.join(_literal(item.strip()) for item in items)}]"
    values = _separated(value) if sweep else [value]
    return f"{key}={','.join(_as_text(single) for single in values)}"


def _separated(values: str) -> list[str]:
    """The parts of a text between commas outside of quotation marks."""
    return re.findall(rf"(?:^|,)\s*((?:{_QUOTED})(?=\s*(?:,|$))|[^,]*)", values)


def _as_text(value: str) -> str:
    return value if value == "null" else _literal(value)


def _literal(value: str) -> str:
    return value if re.fullmatch(_QUOTED, value, re.DOTALL) else quoted(value)
