import csv

import pytest
import torch

from benchmarks.gated_delta_rule import CASES, Case, main, measure

TINY = (Case(1, 70, 2, 8, 4, backward=True), Case(2, 64, 1, 8, 8, backward=False))
KINDS = [
    ("B=1 T=70 H=2 K=8 V=4", "forward", "chunked"),
    ("B=1 T=70 H=2 K=8 V=4", "forward", "reference"),
    ("B=1 T=70 H=2 K=8 V=4", "forward+backward", "chunked"),
    ("B=1 T=70 H=2 K=8 V=4", "forward+backward", "reference"),
    ("B=2 T=64 H=1 K=8 V=8", "forward", "chunked"),
    ("B=2 T=64 H=1 K=8 V=8", "forward", "reference"),
]


def test_useful_products_are_those_of_the_formula():
    assert CASES[0].flops == 2048 * 4 * (10 * 64 * 128 + 6 * 128 * 128)


def test_every_backend_is_timed_in_every_direction():
    timings = measure(TINY, rounds=3, device=torch.device("cpu"), mm_size=16)
    assert [(t.case.name, t.direction, t.backend) for t in timings] == KINDS
    assert all(0 < t.min_ms <= t.median_ms for t in timings)
    assert all((t.share_of_mm is None) == (t.direction == "forward+backward") for t in timings)
    assert all(t.share_of_mm > 0 for t in timings if t.share_of_mm is not None)


def test_rows_are_added_under_one_heading(tmp_path, capsys):
    path = tmp_path / "results.csv"
    for _ in range(2):
        assert main(["--rounds", "1", "--csv", str(path)], cases=TINY) == 0
    text = capsys.readouterr().out
    assert "forward+backward" in text
    assert f"added 6 rows to {path}" in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["direction"], row["backend"]) for row in rows] == 2 * KINDS
    machine = ["date", "commit", "device", "torch", "threads", "script"]
    timing = ["case", "backend", "direction", "min_ms", "median_ms", "share_of_mm"]
    assert list(rows[0]) == machine + timing
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["threads"] == str(torch.get_num_threads())
    assert [bool(row["share_of_mm"]) for row in rows[:6]] == [True, True, False, False, True, True]


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_counts_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, "0"])
    assert stop.value.code == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
