import csv

import pytest

from benchmarks.gated_delta_rule import SUITES
from benchmarks.plot import main, read

SCRIPT = "gated_delta_rule.py"
COLUMNS = ("date", "device", "script", "case", "backend", "direction", "min_ms", "median_ms")
COLUMNS += ("share_of_copy",)


def write_rows(path):
    cases = [case.name for suite in ("speed", "length") for case in SUITES[suite]]
    rows = [
        ("2000-01-01", "machine", SCRIPT, case, backend, direction, ms)
        for ms in (3.0, 2.0)  # the second measurement counts
        for case in cases
        for backend in ("chunked", "peer")
        for direction in ("forward", "forward+backward")
    ]
    other = ("2000-01-01", "other", SCRIPT, cases[0], "chunked", "forward", 1.0)
    rows.insert(0, other)
    rows.append(("2000-01-01", "last", "training.py", "20m", "gdn2", "step", 1.0))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return cases


def test_the_last_rows_of_a_device_count(tmp_path):
    cases = write_rows(tmp_path / "results.csv")
    times, device = read(tmp_path / "results.csv", SCRIPT)
    assert device == "machine"
    assert times[cases[0], "chunked", "forward"] == 2.0
    times, _ = read(tmp_path / "results.csv", SCRIPT, "other")
    assert times == {(cases[0], "chunked", "forward"): 1.0}


def test_pictures_are_drawn(tmp_path, capsys):
    path = tmp_path / "results.csv"
    write_rows(path)
    words = ["--csv", str(path), "--to", str(tmp_path)]
    assert main(words) == 0
    assert [png.name for png in tmp_path.glob("*.png")] == ["cpu_speed.png"]
    with path.open("a", newline="") as file:
        for backend in ("triton", "fla"):
            for case, direction in (("gdn2: B=8 T=2048", "forward"), ("decode: B=4 T=1", "step")):
                numbers = (2.0, 2.5, 0.5)
                row = ("2000-01-01", "gpu", "gpu.py", case, backend, direction, *numbers)
                csv.writer(file).writerow(row)
    assert main(words) == 0
    assert (tmp_path / "gpu_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "gpu_speed.png" in capsys.readouterr().out


def test_a_picture_is_drawn_where_the_device_has_rows(tmp_path, capsys):
    path = tmp_path / "results.csv"
    write_rows(path)
    with path.open("a", newline="") as file:
        row = ("2000-01-01", "gpu", "gpu.py", "step: B=4 T=1", "triton", "step", 2.0, 2.5, 0.5)
        csv.writer(file).writerow(row)
    words = ["--csv", str(path), "--to", str(tmp_path), "--device"]
    assert main([*words, "gpu"]) == 0
    assert [png.name for png in tmp_path.glob("*.png")] == ["gpu_speed.png"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "last"])
    assert stop.value.code == 2
    assert "no rows to draw" in capsys.readouterr().err
