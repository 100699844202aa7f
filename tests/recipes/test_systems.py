import csv
from pathlib import Path

import pytest

from gdn2 import presets
from gdn2.data import prepare
from gdn2.train import Run, override_all
from recipes import systems

SIZES = ["schedule.total_tokens=2048", "model.vocab_size=300"]


@pytest.mark.parametrize("size", presets.SIZES)
def test_a_size_has_every_system_beside_its_hybrid(size):
    names = list(systems.presets_of(size))
    assert len(names) == 16
    assert names[0] == "gdn2"
    assert systems.presets_of("125m")["kda_hybrid"] == "kda_125m_hybrid"
    assert systems.presets_of("demo")["kda_hybrid"] == "demo_kda_hybrid"
    for first, second in zip(names[:14:2], names[1:14:2], strict=True):
        assert second == first + "_hybrid"
    assert not any("hybrid" in name for name in names[14:])


def test_the_best_mean_comes_first():
    rows = [{"preset": p, "bits_per_byte": b} for p, b in (("a", 2.0), ("b", 1.0), ("a", 1.5))]
    assert systems.by_preset(rows) == {"b": [1.0], "a": [2.0, 1.5]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for n in range(60):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"line {n} of a small text\n" * 30)
    prepare([tmp_path / "texts"], tmp_path / "data", vocab_size=300, val_fraction=0.2, workers=1)
    return tmp_path / "data"


def test_all_systems_are_trained_scored_and_drawn(data, tmp_path, monkeypatch, capsys):
    def tiny() -> Run:
        return override_all(presets.debug(), SIZES)

    for name in ("demo_gdn2", "demo_kda"):
        monkeypatch.setitem(presets.PRESETS, name, tiny)
    out = tmp_path / "systems"
    command = ["systems", "--data", str(data), "--out", str(out), "--only", "gdn2", "kda"]
    monkeypatch.setattr("sys.argv", command)
    assert systems.main() == 0
    first = (out / "systems.csv").read_bytes()
    rows = list(csv.DictReader(first.decode().splitlines()))
    order = [(name, seed) for seed in "12" for name in ("demo_gdn2", "demo_kda")]
    assert [(row["preset"], row["seed"]) for row in rows] == order
    assert rows[0]["bits_per_byte"] == rows[1]["bits_per_byte"]  # one model, one seed
    assert rows[0]["bits_per_byte"] != rows[2]["bits_per_byte"]
    assert (out / "systems.png").read_bytes().startswith(b"\x89PNG")
    assert "demo_kda" in capsys.readouterr().out
    trained = (out / "demo_gdn2" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns
    assert systems.main() == 0  # nothing is left to do
    assert (out / "demo_gdn2" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns == trained
    assert (out / "systems.csv").read_bytes() == first
    monkeypatch.setattr("sys.argv", command[:-1])
    assert systems.main() == 0  # the others are shown too
    assert (out / "systems.csv").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "there is no size 'huge'"),
        (["--only", "gdn2_20m"], "--only takes gdn2, gdn2_hybrid, gated_deltanet,"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_wrong_choices_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["systems", "--data", "data", *words])
    with pytest.raises(SystemExit) as stopped:
        systems.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_that_fails_ends_with_its_code(tmp_path, monkeypatch, capsys):
    command = ["systems", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        systems.main()
    assert stopped.value.code == 2
    assert "none" in capsys.readouterr().err
