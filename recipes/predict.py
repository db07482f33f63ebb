"""Outputs of a trained model: ``sparse-attn predict run=DIR [input=FILE]`` or ``python -m recipes.predict``.

The input has one word per line, from a file or standard input. For a model that also reads features or a language, a
line has these in tab-separated columns too. A blank line gives an empty line.

The output has one line per input line: the input, a tab, and the prediction. With ``n_best``, the output has a line for
each of the best predictions, best first. ``scores=true`` adds the log-probability in a further column.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from omegaconf import DictConfig

from .ensemble import load_ensemble
from .evaluate import chosen_decoding
from .folders import replacing
from .launch import run_hydra
from .seq2seq.data.files import split_lines
from .seq2seq.decode import Hypothesis
from .seq2seq.task import Seq2SeqTask

BATCH_LINES = 512


def predict(cfg: DictConfig) -> dict[str, int]:
    """Reads words, writes their predictions, and warns on standard error about tokens not seen in training.

    Args:
        cfg: ``configs/predict.yaml``, composed by Hydra.

    Returns:
        ``lines``: number of lines read; ``unknown``: number of lines with a token that was not seen in training.

    Raises:
        FileNotFoundError: If the run, its checkpoint, the input or the folder of the output is missing.
        TypeError: If a setting has the wrong type.
        ValueError: If the input is empty or not UTF-8, a line has a wrong number of columns, a setting is outside its
            range, a checkpoint cannot be read, or the runs of an ensemble have different vocabularies.
    """
    counts = {"lines": 0, "unknown": 0}
    # launch.py puts the null device in place of a closed stream.
    if cfg.output is None and getattr(sys.stdout, "name", None) == os.devnull:
        raise ValueError("standard output is closed; give output=FILE")
    with contextlib.ExitStack() as stack:
        source, name = _open_input(cfg.input, stack)
        decoding = chosen_decoding(cfg)
        if not isinstance(cfg.scores, bool):
            raise TypeError(f"scores must be true or false, got {cfg.scores!r}")
        ensemble = load_ensemble(cfg.run, cfg.checkpoint, cfg.average)
        task = ensemble.task
        decode = partial(decoding.hypotheses, ensemble.models, max_length=ensemble.max_length)
        lines = read_words(source, name, task.source_tokenizer.fields)
        if cfg.input is not None:
            # Errors in a file are reported before the first line is printed.
            lines = iter(list(lines))
        # At a terminal, the output of a line is printed before the next line is read.
        size = BATCH_LINES
        if source.isatty():
            size = 1
            print("reading words from the terminal, one per line; end with Ctrl-D", file=sys.stderr)
        batch = list(itertools.islice(lines, size))
        # The output is opened only when there is a line to write: wrong input must not overwrite an earlier output.
        target = stack.enter_context(_output(cfg.output, cfg.input))
        with _closed_pipe_is_no_error(target):
            while batch:
                _warn(task, batch, counts)
                words = [word for _, word in batch if word]
                found = iter(task.decode_words(words, decode) if words else ())
                for _, word in batch:
                    for line in _lines(task, word, next(found), scores=cfg.scores) if word else [""]:
                        target.write(f"{line}\n")
                target.flush()
                batch = list(itertools.islice(lines, size))
    return counts


def read_words(source: Iterable[bytes], name: str, fields: Sequence[str] = ("source",)) -> Iterator[tuple[int, str]]:
    """Line numbers and words, without surrounding white space; a blank line gives an empty word.

    Args:
        source: Lines of UTF-8 text.
        name: The name of the source in messages.
        fields: The fields that the model reads; a line must have one column for each field.

    Raises:
        ValueError: If there is no line, a line is not UTF-8, or a line has another number of columns.
    """
    number = 0
    for line in source:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} must be UTF-8 text, got byte 0x{line[error.start]:02x} in line {number + 1}"
            ) from None
        for part in split_lines(text):
            number += 1
            word = "\t".join(field.strip() for field in part.split("\t")) if part.strip() else ""
            if word and word.count("\t") != len(fields) - 1:
                form = "<TAB>".join(fields) if len(fields) > 1 else "one word without a tab"
                raise ValueError(f"{name}, line {number}: a line must be {form}, got {word!r}")
            yield number, word
    if number == 0:
        raise ValueError(f"{name} must hold at least one line, got nothing")


def _lines(task: Seq2SeqTask, word: str, hypotheses: Sequence[Hypothesis], *, scores: bool) -> Iterator[str]:
    """A line for each hypothesis of a word."""
    tokenizer = task.target_tokenizer
    for hypothesis in hypotheses:
        text = f"{word}\t{tokenizer.join(tokenizer.words(tokenizer.decode(hypothesis.tokens)))}"
        yield f"{text}\t{hypothesis.log_probability:.6f}" if scores else text


def _warn(task: Seq2SeqTask, batch: list[tuple[int, str]], counts: dict[str, int]) -> None:
    for number, word in batch:
        counts["lines"] += 1
        if word and (unknown := task.source_tokenizer.unknown(word)):
            counts["unknown"] += 1
            tokens = ", ".join(f'"{token}"' if token.isprintable() else ascii(token) for token in unknown)
            print(f'line {number}: "{word}": never seen in training: {tokens}; read as <unk>', file=sys.stderr)


def _open_input(path: str | None, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    if path is None:
        if sys.stdin is None:
            raise ValueError("standard input is closed; give input=FILE")
        return sys.stdin.buffer, "standard input"
    try:
        return stack.enter_context(Path(path).expanduser().open("rb")), str(path)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the input file {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _output(path: str | None, source: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that is renamed to ``path`` after all lines were written."""
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    file = Path(path).expanduser()
    if source is not None and file.exists() and file.samefile(Path(source).expanduser()):
        raise ValueError(f"output must be another file than input, got {str(path)!r} for both")
    try:
        with replacing(file) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
    except OSError as error:
        raise FileNotFoundError(f"cannot write the output file {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _closed_pipe_is_no_error(target: Any) -> Iterator[None]:
    """Ignores the error when the reader of a pipe, such as ``head``, closes it."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes standard output again at exit, and would report the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())


def main() -> None:
    """Runs ``sparse-attn predict``."""
    run_hydra("predict", predict)


if __name__ == "__main__":
    main()
