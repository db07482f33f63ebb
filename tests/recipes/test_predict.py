import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.launch import run_hydra
from recipes.predict import predict
from recipes.run import load_run


def run_predict(*arguments: str) -> None:
    run_hydra("predict", predict, arguments=arguments)


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def expected(run_folder: Path, words: list[str]) -> list[str]:
    task = load_run(run_folder).task
    return [f"{word}\t{task.target_tokenizer.join(task.predict_words([word])[0])}" if word else "" for word in words]


def test_every_input_line_gives_one_output_line(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"\xef\xbb\xbfcab\n\n  abba \r\n\t\nbaobab")
    run_predict(f"run={run_folder}")
    out, err = capsys.readouterr()
    assert out.splitlines() == expected(run_folder, ["cab", "", "abba", "", "baobab"])
    assert err == ""


def test_more_lines_than_a_batch_keep_their_order(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipes.predict.BATCH_LINES", 3)
    words = ["cab", "", "", "", "abba", "bac", "", "dada"]
    file = run_folder / "words.txt"
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    run_predict(f"run={run_folder}", f"input={file}")
    assert capsys.readouterr().out.splitlines() == expected(run_folder, words)


def test_unseen_characters_are_reported_and_every_line_is_written(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, "cab\n\nnaïn\ncab\u200b\n".encode())
    run_predict(f"run={run_folder}")
    out, err = capsys.readouterr()
    assert [line.partition("\t")[0] for line in out.splitlines()] == ["cab", "", "naïn", "cab\u200b"]
    assert err.splitlines() == [
        'line 3: "naïn": never seen in training: "n", "ï"; read as <unk>',
        "line 4: \"cab\u200b\": never seen in training: '\\u200b'; read as <unk>",
    ]


def test_predictions_are_written_to_the_output_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, output = tmp_path / "words.txt", tmp_path / "out.tsv"
    words.write_text("cab\nabba\n", encoding="utf-8")
    run_predict(f"run={run_folder}", f"input={words}", f"output={output}", "checkpoint=last")
    assert capsys.readouterr().out == ""
    assert output.read_text(encoding="utf-8").splitlines() == expected(run_folder, ["cab", "abba"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the input file '{file}': No such file or directory"),
        (b"", "{file} must hold at least one line, got nothing"),
        (b"cab\nna\xefve\n", "{file} must be UTF-8 text, got byte 0xef in line 2"),
        (b"cab\nabba\tA B\n", "{file}, line 2: a line must be one word without a tab, got 'abba\\tA B'"),
    ],
)
def test_invalid_input_gives_a_one_line_error_and_no_output(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run_predict(f"run={run_folder}", f"input={file}")
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"sparse-attn predict: {message.format(file=file)}\n"


def test_empty_standard_input_is_refused_and_an_earlier_output_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"")
    (tmp_path / "out.txt").write_text("an earlier output")
    with pytest.raises(SystemExit):
        run_predict(f"run={run_folder}", f"output={tmp_path / 'out.txt'}")
    assert (tmp_path / "out.txt").read_text() == "an earlier output"
    assert capsys.readouterr().err == "sparse-attn predict: standard input must hold at least one line, got nothing\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/out.tsv", "cannot write the output file '{path}': No such file or directory"),
        ("words.txt", "output must be another file than input, got '{path}' for both"),
    ],
)
def test_an_invalid_output_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cab\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run_predict(f"run={run_folder}", f"input={words}", f"output={tmp_path / output}")
    assert capsys.readouterr().err == f"sparse-attn predict: {message.format(path=tmp_path / output)}\n"
    assert words.read_text(encoding="utf-8") == "cab\n"


def test_at_a_terminal_each_line_is_answered_at_once(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered: list[int] = []

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int | None = -1) -> bytes:
            return super().readline(size)

        def __next__(self) -> bytes:
            answered.append(capsys.readouterr().out.count("\n"))
            return super().__next__()

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Terminal(b"cab\nabba\n")})())
    monkeypatch.setattr("recipes.predict.print", lambda *args, **_: answered.append(len(args)), raising=False)
    run_predict(f"run={run_folder}")
    # One hint is printed. The other numbers are the new answers before line 1, before line 2 and at the end.
    assert answered == [1, 0, 1, 1]


def test_a_closed_pipe_is_not_an_error(run_folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cab\nabba\n" * 20_000, encoding="utf-8")
    command = [sys.executable, "-m", "recipes.predict", f"run={run_folder}", f"input={words}"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"cab\t")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "finished",
        "test.tsv",
        "train.tsv",
        "val.tsv",
        "words.txt",
    ]
