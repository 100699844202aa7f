import csv

import pytest
import torch

from benchmarks import decode_memory
from benchmarks.decode_memory import MODELS, apart, main, measure
from gdn2.models.accounting import account
from gdn2.presets import load_preset

DEVICE = torch.device("cpu")
OPTIONS = {"tokens": 2, "device": DEVICE, "threads": 1}


def at_once(function, *args, **options):
    return function(*args, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_has_the_bytes_that_are_accounted_for(name):
    config = load_preset("debug").model
    sizes = {T: measure(config, name, T, **OPTIONS).case.cache for T in (64, 640)}
    config.mixers = MODELS[name] or ["full_attention"]
    for T, got in sizes.items():
        # Decoding adds a token to the cache of full attention at every step, the first 3 untimed.
        length = T + (5 if name == "llama" else 0)
        expected = account(config, length=length, dtype=torch.float32)["state_bytes"]["total"]
        counters = 8 * config.layer_mixers.count("sliding_attention")
        assert got == expected + counters


def test_a_cache_that_does_not_fit_is_left_out(monkeypatch):
    config = load_preset("debug").model
    monkeypatch.setattr(decode_memory, "_room", lambda device: 2e5)
    assert measure(config, "llama", 8, **OPTIONS) is not None
    assert measure(config, "llama", 2000, **OPTIONS) is None
    assert measure(config, "gdn2", 2000, **OPTIONS) is not None


def test_rows_and_a_picture_of_every_context(tmp_path, capsys):
    table, picture = tmp_path / "results.csv", tmp_path / "picture.png"
    words = ["debug", "--contexts", "8", "40", "--tokens", "2", "--threads", "1"]
    assert main([*words, "--csv", str(table), "--png", str(picture)], call=at_once) == 0
    assert f"added 6 rows to {table}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["backend"], row["case"].split()[1]) for row in rows]
    assert found == [(name, f"T={T}") for T in (8, 40) for name in MODELS]
    assert {(row["script"], row["direction"]) for row in rows} == {("decode_memory.py", "decode")}
    assert all(0 < float(row["min_ms"]) <= float(row["median_ms"]) for row in rows)


def test_a_case_runs_in_a_process_of_its_own():
    assert apart(torch.get_num_threads) > 0


def test_wrong_counts_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["debug", "--contexts", "0"])
    assert stop.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err
