"""The README's Python runs, and its paths exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_a_python_block():
    assert BLOCKS


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
