import csv

import pytest
import torch

from benchmarks.gated_delta_rule import Case
from benchmarks.gated_delta_step import _calls, main


def test_four_operations_are_a_step():
    calls = _calls(Case("step", 2, 1, 3, 8, 8))
    for _ in range(3):
        out, _ = calls["chunked"]()
        assert torch.allclose(out, calls["four operations"](), atol=1e-6)


def test_rows_are_added(tmp_path, capsys):
    path = tmp_path / "results.csv"
    assert main(["--rounds", "1", "--csv", str(path)], sizes=[(1, 2, 8)]) == 0
    assert "states of 0.000488281 MiB" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["backend"] for row in rows] == ["copy", "four operations", "chunked"]


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--threads", "0"]])
def test_counts_start_at_one(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "must be at least 1" in capsys.readouterr().err
