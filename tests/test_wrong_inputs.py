"""What every command does with wrong input: one line that helps, an exit code, nothing half-done.

The cases of each command are those of wrong_lines.py.
"""

import fcntl
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wrong_lines import (
    CHECKPOINTS,
    DAMAGED_CHECKPOINTS,
    EVAL,
    FAILURES,
    GENERATE,
    INFO,
    OVERRIDES,
    PREPARE,
    TINY,
    TRAIN,
)
from wrong_things import TEXT, Things

from gdn2 import cli


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    root = tmp_path_factory.mktemp("wrong")
    rows = [{"text": f"{n}. " + TEXT * (1 + n % 7)} for n in range(80)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "things").mkdir()
    made = Things(root / "things", root / "data", root / "run")
    for line in (
        "prepare {texts} --out {data} --vocab-size 300 --val-fraction 0.1",
        f"train debug --data {{data}} --out {{run}} {TINY}",
    ):
        assert cli.main(made.expand(line, root / "out")) == 0
    return made


@pytest.fixture
def call(
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], tuple[int, str]]:
    """Run a command line in an empty folder; its code and its only complaint."""

    def run(line: str) -> tuple[int, str]:
        words = things.expand(line, tmp_path / "out")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = cli.main(words)
        text = capsys.readouterr().err
        assert "Traceback" not in text
        *before, last = text.splitlines()
        assert last.startswith("gdn2")
        assert ": error: " in last
        assert last.isprintable()
        assert len(last) < 1400
        assert not [line for line in before if "error" in line]
        assert len(before) <= 3
        for name in ("manifest.json", "final", "eval.json", "eval.png"):
            assert not (tmp_path / "out" / name).exists()
        return code, last

    return run


def lines(command: str, cases: list[tuple[str, str]], form: str = "{}") -> list[Any]:
    cases = [(f"{command} {form.replace('{}', line)}", said) for line, said in cases]
    return [pytest.param(line, said, id=ascii(line)[1:-1][:120]) for line, said in cases]


def test_there_are_thirty_cases_of_every_command() -> None:
    checkpoints = len(CHECKPOINTS) + len(DAMAGED_CHECKPOINTS)
    for cases in (PREPARE, TRAIN, EVAL, GENERATE, INFO + OVERRIDES):
        assert len(cases) + checkpoints * (cases in (EVAL, GENERATE)) >= 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *lines("prepare", PREPARE),
        *lines("train", TRAIN),
        *lines("eval", EVAL),
        *lines("eval", CHECKPOINTS, "{} --out {out} --data {data}"),
        *lines("generate", GENERATE),
        *lines("generate", CHECKPOINTS, "{} --prompt a --max-new-tokens 2"),
        *lines("info", INFO),
        *lines("info", OVERRIDES, "debug {}"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, said: str, call: Callable[[str], tuple[int, str]]
) -> None:
    code, message = call(line)
    assert said in message
    assert code == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *lines("train", FAILURES),
        *lines("eval", DAMAGED_CHECKPOINTS, "{} --out {out} --data {data}"),
        *lines("generate", DAMAGED_CHECKPOINTS, "{} --prompt a --max-new-tokens 2"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    line: str, said: str, call: Callable[[str], tuple[int, str]]
) -> None:
    code, message = call(line)
    assert said in message
    assert code == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("prepare {texts} --out {out}", 0),
        ("prepare {texts} --out {out}", 2000),
        ("prepare {texts} --out {out} --tokenizer {data}/tokenizer", 3000),
        (f"train debug --data {{data}} --out {{out}} {TINY}", 0),
        (f"train debug --data {{data}} --out {{out}} {TINY}", 20_000),
        ("eval {run} --out {out}", 0),
        ("eval {run} --out {out}", 2000),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(
    line: str, size: int, call: Callable[[str], tuple[int, str]]
) -> None:
    with largest_file(size):
        code, message = call(line)
    assert code == 1
    assert "out" in message


@pytest.mark.parametrize(
    "line", ["prepare {texts} --out {out}", f"train debug --data {{data}} --out {{out}} {TINY}"]
)
def test_a_folder_in_use_is_left_alone(
    line: str, tmp_path: Path, call: Callable[[str], tuple[int, str]]
) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, message = call(line)
    os.close(descriptor)
    assert code == 1
    assert "is in use by another process" in message
    assert not list((tmp_path / "out").iterdir())


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


PRINTING = ("eval {run} --out {out}", "generate {run} --prompt a --max-new-tokens 2", "info debug")


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_without_a_reader_is_exit_code_1_and_no_word(
    line: str, things: Things, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with monkeypatch.context() as patch, pipe_without_reader() as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(things.expand(line, tmp_path / "out")) == 1
    assert "error" not in errors.getvalue()


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_on_a_full_disk_is_said_once(
    line: str,
    things: Things,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(things.expand(line, tmp_path / "out")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "gdn2: error: stdout: No space left on device"


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_of_a_poor_encoding_gets_escapes(
    line: str, things: Things, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    words = things.expand(line.replace("prompt a", "prompt δ"), tmp_path / "out")
    assert cli.main(words) == 0
    assert raw.getvalue().isascii()


def test_closed_streams_are_no_drama() -> None:
    command = f"{shlex.quote(sys.executable)} -m gdn2.cli"
    for end in ("--help >&-", "--help >&- 2>&- <&-"):
        subprocess.run(f"{command} {end}", shell=True, check=True)
    done = subprocess.run(f"{command} nonsense 2>&-", shell=True, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


def test_names_that_are_not_utf8_are_names(things: Things, tmp_path: Path) -> None:
    source, out = tmp_path / "caf\udce9.jsonl", tmp_path / "o\udce9"
    shutil.copyfile(things["texts"], source)
    for _ in range(2):
        assert cli.main(["prepare", str(source), "--out", str(out), "--vocab-size", "300"]) == 0
    assert json.loads((out / "manifest.json").read_text())["sources"][0]["name"] == str(source)


@pytest.mark.parametrize(
    "line",
    [
        "prepare {texts} --out {out}",
        "train debug --data {data} --out {out}",
        "eval {run} --out {out}",
    ],
)
def test_a_read_only_folder_is_refused_before_the_work(
    line: str,
    call: Callable[[str], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    access = os.access  # chmod does not stop root
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    code, message = call(line)
    assert code == 2
    assert message.endswith("out is read-only; choose another")


def test_a_wrong_option_does_not_spoil_the_folder(
    call: Callable[[str], tuple[int, str]], things: Things, tmp_path: Path
) -> None:
    assert call("prepare {texts} --out {out} --text-column body")[0] == 2
    line = "prepare {texts} --out {out} --vocab-size 300"
    assert cli.main(things.expand(line, tmp_path / "out")) == 0
