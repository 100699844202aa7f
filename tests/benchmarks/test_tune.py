"""The search for sizes, rehearsed in Triton's interpreter."""

import math

import pytest
import torch
from compilers import interpreted

if not interpreted():
    pytest.skip("needs triton, and TRITON_INTERPRET=1", allow_module_level=True)

from benchmarks import gpu, tune
from gdn2.ops.triton.sizes import INTERPRETER, Key, Sizes, read, sizes_of

pytestmark = pytest.mark.triton
START = sizes_of("channel", 16, 16, torch.float16, INTERPRETER)


def test_descends_to_the_least():
    """The best number of warps depends on BV: a second round finds it."""
    tried = []

    def measure(row: Sizes) -> float:
        tried.append(row)
        if row.BV == 64:
            return math.inf
        return 1.0 + abs(row.BV - 128) / 100 + abs(row.scan_warps - row.BV // 16) / 10

    found = tune.search(START, {"scan_warps": (2, 4, 8), "BV": (16, 64, 128)}, measure)
    assert found == START._replace(BV=128, scan_warps=8)
    assert len(set(tried)) == len(tried)


def test_what_does_not_run_is_infinitely_slow(capsys):
    def time(case):
        raise RuntimeError("out of resource\nand so on")

    assert tune.mean(START, [gpu.decoding("gdn2", 1, 16)], time) == math.inf
    assert capsys.readouterr().out == "  RuntimeError: out of resource\n"


def test_writes_rows_that_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DTYPES", {"dtype": torch.float16, "decay_dtype": torch.float32})
    monkeypatch.setattr(gpu, "ROTATED", 2**15)
    monkeypatch.setattr(tune, "SUITES", ("channel-16", "head-16"))
    monkeypatch.setattr(tune, "FORTH", {"C": (16, 32), "L": (32, 40)})
    monkeypatch.setattr(tune, "BACK", {"gradients_BV": (16,)})
    monkeypatch.setattr(tune, "STEPS", {"step_BV": (16,)})
    path = tmp_path / "sizes.csv"
    words = ["--rounds", "1", "--table", str(path)]
    assert tune.main(words, shapes=[(1, 40, 2)], batches=[1], device="cpu") == 0
    table = read(path)
    for decay in ("channel", "head"):
        row = table[Key(INTERPRETER, 2, decay, 16, 16)]
        assert row.C in (16, 32)
        assert row.L % row.C == 0
    text = capsys.readouterr().out
    assert "ms with C=16" in text
    assert text.count("ms with gradients_BV=16") == 2
