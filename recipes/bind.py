"""Checks the keys and values of a config section as arguments of a function; errors name the section."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def check_arguments(
    function: Callable[..., Any],
    section: str,
    arguments: Mapping[str, Any],
    *,
    reserved: Collection[str] = (),
) -> None:
    """Checks names and types of keyword arguments against the signature of ``function``.

    A config file has no types: without this check, a text instead of a number would cause an error far from its
    origin. The type of a list or dict is checked, but not the types of the elements.

    Args:
        function: The function to be called; a class stands for its constructor.
        section: Name of the config section, for the message.
        arguments: The keys and values of the section.
        reserved: Arguments that the section must not contain.

    Raises:
        ValueError: If a key is reserved or not an argument of ``function``, or a number is infinite, NaN or too large
            for 64 bits.
        TypeError: If a value does not have the annotated type.

    Example:
        >>> def area(*, width: int, height: float = 1.0) -> float: ...
        >>> check_arguments(area, "shape", {"width": "wide"})
        Traceback (most recent call last):
            ...
        TypeError: shape.width must be a whole number, got 'wide'
    """
    allowed = [name for name in inspect.signature(function).parameters if name not in reserved]
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in arguments.items():
        if name not in allowed:
            close = get_close_matches(str(name), allowed, n=1)
            question = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown key '{section}.{name}'{question}; allowed: {', '.join(allowed)}")
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{section}.{name} must be {' or '.join(_describe(hints[name]))}, got {value!r}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{section}.{name} must be a number of at most 64 bits, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{section}.{name} must be a finite number, got {value}")


@contextlib.contextmanager
def keys_named(section: str, names: Collection[str]) -> Iterator[None]:
    """Puts the section before the message of an error, if the message begins with a key of the section.

    Args:
        section: Name of the config section.
        names: The keys, which are arguments of the functions that raise the errors.

    Example:
        >>> with keys_named("model", ["dim"]):
        ...     raise ValueError("dim must be at least 1, got 0")
        Traceback (most recent call last):
            ...
        ValueError: model.dim must be at least 1, got 0
    """
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        if re.split(r"[ .\[]", str(error), maxsplit=1)[0] not in names:
            raise
        raise type(error)(f"{section}.{error}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if origin is not None:
        return isinstance(value, origin)
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _describe(hint: Any) -> Sequence[str]:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for option in options for word in _describe(option)))
    if origin is Literal:
        return [repr(option) for option in options]
    return [_WORDS.get(hint, getattr(hint, "__name__", str(hint)))]
