"""The benchmark of the kernels, rehearsed in Triton's interpreter at sizes of nothing."""

import csv

import pytest
import torch
from compilers import interpreted

from benchmarks import gpu
from gdn2.ops import gated_delta_rule

if not interpreted():
    pytest.skip("needs triton, and TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.triton


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CHANNELS", (16,))
    monkeypatch.setattr(gpu, "DTYPES", {"dtype": torch.float16, "decay_dtype": torch.float32})
    monkeypatch.setattr(gpu, "ROTATED", 2**15)
    monkeypatch.setattr(gpu, "load_kernels", lambda _: {"peer": peer})
    monkeypatch.setattr(gpu, "load_step_kernel", lambda: {"peer step": peer_step})
    path = tmp_path / "results.csv"

    def run(*words: str) -> tuple[int, list[dict[str, str]]]:
        arguments = [*words, "--rounds", "2", "--csv", str(path)]
        code = gpu.main(arguments, shapes=[(1, 20, 2)], batches=[1], device="cpu")
        with path.open(newline="") as file:
            return code, list(csv.DictReader(file))

    return run


def peer(q, k, v, log_decay, erase, write):
    gates = {"log_decay": log_decay, "erase": erase, "write": write}
    return gated_delta_rule(q, k, v, **gates, scale=q.shape[-1] ** -0.5)[0]


def peer_step(*operands, initial_state, out):
    assert initial_state.shape == (1, 16, 16, 16)
    assert out.shape == operands[2].shape


def test_every_suite_adds_its_rows(tiny, capsys):
    code, rows = tiny()
    assert code == 0
    names = [(row["case"].partition(":")[0], row["backend"], row["direction"]) for row in rows]
    dtypes = "in float16, log_decay float32"
    members = [
        (f"{m} {dtypes}", name, direction)
        for m in gpu.MEMBERS
        for direction in ("forward", "forward+backward")
        for name in ("triton", "peer")
    ]
    steps = [(f"step of gdn2 {dtypes}", name, "step") for name in ("triton", "peer step")]
    assert names == members + steps
    assert all(row["share_of_copy"] for row in rows)
    text = capsys.readouterr().out
    assert "first forward+backward" in text
    assert text.count("TB/s copied in this run") == 3


def test_what_is_wrong_is_named_and_not_timed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "load_kernels", lambda _: {"peer": lambda *x: 2 * peer(*x)})
    code, rows = tiny("kda")
    assert code == 1
    assert {row["backend"] for row in rows} == {"triton"}
    case, text = "log_decay float32: B=1 T=20 H=2 K=16 V=16", capsys.readouterr().err
    for direction in gpu.DIRECTIONS:
        assert f"{case}: {direction} of peer wrong by 1.0e+00" in text


def test_gradients_that_are_wrong_are_named(tiny, monkeypatch, capsys):
    def half_the_gradient(q, *others):
        return peer((q + q.detach()) / 2, *others)

    monkeypatch.setattr(gpu, "load_kernels", lambda _: {"peer": half_the_gradient})
    code, rows = tiny("gdn2")
    assert code == 1
    assert [row["direction"] for row in rows if row["backend"] == "peer"] == ["forward"]
    assert "forward+backward of peer wrong by 5.0e-01" in capsys.readouterr().err


def test_a_peer_that_does_not_run_is_left_out(tiny, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("not on this GPU")

    monkeypatch.setattr(gpu, "load_kernels", lambda _: {"peer": refuse})
    code, rows = tiny("kda")
    assert code == 0
    assert {row["backend"] for row in rows} == {"triton"}
    assert "forward of peer does not run: not on this GPU" in capsys.readouterr().out


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["mamba"])
    assert "there is no suite 'mamba', only gdn2" in capsys.readouterr().err
