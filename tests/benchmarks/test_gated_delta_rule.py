import csv

import pytest
import torch

from benchmarks.gated_delta_rule import (
    MEMBERS,
    SUITES,
    Case,
    _call,
    implementations,
    main,
    measure,
)
from benchmarks.peers import load_peers

TINY = (
    Case("loop", 1, 70, 2, K=8, V=4, loop=True),
    Case("packed", 1, 64, 1, K=8, V=8, HV=2, gate_heads=2, cu_seqlens=(0, 3, 64), backward=False),
    Case("tied", 1, 64, 1, K=8, V=8, decay="head", erase=None, log_decays=(0.0, -90.0)),
)
KINDS = [
    ("loop", "forward", "chunked"),
    ("loop", "forward", "reference"),
    ("loop", "forward+backward", "chunked"),
    ("loop", "forward+backward", "reference"),
    ("packed", "forward", "chunked"),
    ("tied", "forward", "chunked"),
    ("tied", "forward+backward", "chunked"),
]


def test_useful_products_are_those_of_the_formula():
    assert SUITES["speed"][0].flops == 2048 * 4 * (10 * 64 * 128 + 6 * 128 * 128)


def test_every_implementation_is_timed_in_every_direction():
    timings = measure(TINY, rounds=3, device=torch.device("cpu"), mm_size=16)
    assert [(t.case.title, t.direction, t.backend) for t in timings] == KINDS
    assert all(0 < t.min_ms <= t.median_ms for t in timings)
    assert all((t.share_of_mm is None) == (t.direction == "forward+backward") for t in timings)
    assert all(t.share_of_mm > 0 for t in timings if t.share_of_mm is not None)


@pytest.mark.peer
@pytest.mark.parametrize("member", MEMBERS)
def test_peers_compute_the_same(member):
    case = Case(member, 1, 64, 2, K=16, V=16, member=member, backward=False, **MEMBERS[member])
    peers = load_peers(member)
    if not any(name.startswith("fla") for name in peers):
        pytest.skip("fla-core is not installed: make peers")
    ours, *theirs = outputs(case)
    assert len(theirs) == len(peers) >= 2
    for out in theirs:
        assert (out - ours).abs().max() < 1e-5


def outputs(case: Case) -> list[torch.Tensor]:
    """What each implementation gives for the operands that are timed, with erase and write tied."""
    results = []

    def record(rule):
        def recorded(q, k, v, log_decay, erase, write):
            tied = write if case.erase == "channel" else erase
            results.append(rule(q, k, v, log_decay, erase, tied))
            return results[-1]

        return recorded

    for rule in implementations(case).values():
        _call(case, record(rule), "forward", torch.device("cpu"))()
    return results


def test_rows_are_added_under_one_heading(tmp_path, capsys):
    path = tmp_path / "results.csv"
    for _ in range(2):
        assert main(["--rounds", "1", "--csv", str(path)], suites={"tiny": TINY}) == 0
    text = capsys.readouterr().out
    assert "packed: B=1 T=64" in text
    assert f"added 7 rows to {path}" in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["case"].partition(":")[0], row["direction"], row["backend"]) for row in rows]
    assert names == 2 * KINDS
    machine = ["date", "commit", "device", "torch", "triton", "threads", "script"]
    timing = ["case", "backend", "direction", "min_ms", "median_ms"]
    shares = ["share_of_mm", "share_of_copy", "peak_mb"]
    assert list(rows[0]) == machine + timing + shares
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["threads"] == str(torch.get_num_threads())
    assert [bool(row["share_of_mm"]) for row in rows[:7]] == [d == "forward" for _, d, _ in KINDS]


def test_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sped"])
    assert stop.value.code == 2
    assert "no suite 'sped', only speed, forms, length" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_counts_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, "0"])
    assert stop.value.code == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("date,milliseconds\n")
    with pytest.raises(SystemExit, match="has other columns than date,commit"):
        main(["--rounds", "1", "--csv", str(path)], suites={"tiny": TINY[:1]})
    assert path.read_text() == "date,milliseconds\n"
