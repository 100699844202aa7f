import csv

from benchmarks.gated_delta_rule import SUITES
from benchmarks.plot import main, read

COLUMNS = ("date", "device", "script", "case", "backend", "direction", "min_ms")


def write_rows(path):
    cases = [case.name for suite in ("speed", "length") for case in SUITES[suite]]
    rows = [
        ("2000-01-01", "machine", "gated_delta_rule.py", case, backend, direction, ms)
        for ms in (3.0, 2.0)  # the second measurement counts
        for case in cases
        for backend in ("chunked", "peer")
        for direction in ("forward", "forward+backward")
    ]
    other = ("2000-01-01", "other", "gated_delta_rule.py", cases[0], "chunked", "forward", 1.0)
    rows.insert(0, other)
    rows.append(("2000-01-01", "last", "training.py", "20m", "gdn2", "step", 1.0))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return cases


def test_the_last_rows_of_a_device_count(tmp_path):
    cases = write_rows(tmp_path / "results.csv")
    times, device = read(tmp_path / "results.csv", None)
    assert device == "machine"
    assert times[cases[0], "chunked", "forward"] == 2.0
    times, _ = read(tmp_path / "results.csv", "other")
    assert times == {(cases[0], "chunked", "forward"): 1.0}


def test_a_picture_is_drawn(tmp_path, capsys):
    write_rows(tmp_path / "results.csv")
    png = tmp_path / "speed.png"
    assert main(["--csv", str(tmp_path / "results.csv"), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(png) in capsys.readouterr().out
