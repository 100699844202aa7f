"""The benchmark of layers, rehearsed in Triton's interpreter at sizes of nothing."""

import csv

import pytest
import torch
from compilers import interpreted

from benchmarks import gpu_layers
from gdn2.models import MIXERS
from gdn2.presets import load_preset

if not interpreted():
    pytest.skip("needs triton, and TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.triton


def test_every_suite_adds_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_layers, "DTYPE", torch.float16)
    monkeypatch.setattr(gpu_layers, "MEMBERS", ("gdn2",))
    monkeypatch.setattr(
        gpu_layers, "load_layer", lambda member, config: {"peer": MIXERS[member].build(config)}
    )
    path = tmp_path / "results.csv"
    config = load_preset("debug").model
    words = ["--rounds", "1", "--csv", str(path)]
    assert gpu_layers.main(words, config=config, shapes=[(1, 20)], device="cpu") == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    directions = ("forward", "forward+backward")
    of_layers = [
        ("gdn2 layer: B=1 T=20 D=32 H=2 K=16", backend, direction)
        for direction in directions
        for backend in ("triton", "peer")
    ]
    of_blocks = [
        ("gdn2 block: B=1 T=20 D=32 H=2 K=16", "triton", direction) for direction in directions
    ]
    steps = [(f"{gpu_layers.PRESET} step: B=1 T=20 D=32 H=2 K=16", "triton", "step")]
    assert [(r["case"], r["backend"], r["direction"]) for r in rows] == [
        *of_layers,
        *of_blocks,
        *steps,
    ]
    text = capsys.readouterr().out
    assert text.count("projections") == 2
    assert "tokens/s" in text


def test_kernels_are_put_with_their_part():
    """By names that the profiler shows."""
    names = {
        "prepare_under_channel_decay": "operator",
        "scan_back": "operator",
        "gradients": "operator",
        "normed_conv_backward": "front end",
        "decay_back": "front end",
        "gated_norm_back": "output norm",
        "sm90_xmma_gemm_bf16": "projections",
        "vectorized_elementwise_kernel": "other",
    }
    for name, part in names.items():
        found = next(p for p, parts in gpu_layers.PARTS.items() if any(n in name for n in parts))
        assert found == part
