"""What the README shows runs, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from gdn2 import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(.*?)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in FENCED if language == "python"]
SHELL = [text.splitlines() for language, text in FENCED if language == "bash"]

NOT_RUN = {
    "make demo": "minutes of training; tests/recipes/test_demo.py has what it does with the runs",
    "make test": "this is it",
}
# A line that runs with less to do than the README says: an hour becomes a second.
SMALLER = {
    "gdn2 train": "model.hidden_size=32 model.num_hidden_layers=1 model.intermediate_size=32 "
    "schedule.total_tokens=2048 schedule.warmup_tokens=0 schedule.tokens_per_step=1024 "
    "parallel.micro_batch_size=2 log.validate_every_tokens=none",
}


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("block", SHELL, ids=lambda lines: lines[0].partition("#")[0].strip())
def test_shell_blocks_run(block, tmp_path, monkeypatch, capsys):
    """Line by line, in a folder that has `books/` and nothing else."""
    books = tmp_path / "books"
    books.mkdir()
    for number in range(40):
        text = f"Chapter {number}. It was said {number * number} times. " * 20
        (books / f"{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    for line in block:
        words = shlex.split(line, comments=True)
        if " ".join(words) in NOT_RUN:
            continue
        assert words[0] == "gdn2", f"how is this run? {line}"
        less = SMALLER.get(" ".join(words[:2]), "").split()
        assert cli.main([*words[1:], *less]) == 0, capsys.readouterr().err


def test_every_block_is_one_that_runs():
    assert PYTHON
    assert SHELL
    assert {language for language, _ in FENCED} == {"python", "bash"}
    lines = [" ".join(shlex.split(line, comments=True)) for block in SHELL for line in block]
    assert set(NOT_RUN) <= set(lines)
    for start in SMALLER:
        assert any(line.startswith(start) for line in lines)


def test_named_files_exist():
    paths = set(re.findall(r"`((?:gdn2|docs|recipes|tests)/[\w/.]+)`", README))
    paths |= set(re.findall(r"\]\(([\w/.]+)\)", README))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_named_presets_and_targets_exist():
    from gdn2.presets import PRESETS

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for preset in re.findall(r"gdn2 (?:train|info) (\w+)", README):
        assert preset in PRESETS
