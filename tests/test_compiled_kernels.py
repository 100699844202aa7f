"""The Triton kernels compile for GPUs that are not here, as the committed table says."""

import importlib.util
import itertools
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
import compiled_kernels

KERNELS = {
    "prepare_under_channel_decay",
    "prepare_under_head_decay",
    "scan for outputs",
    "scan for transfers",
    "scan for states",
    "scan_back for transfers",
    "scan_back for gradients",
    "merge",
    "merge back",
    "gradients_under_channel_decay",
    "gradients_under_head_decay",
}
WITHOUT_PRODUCTS = {
    "normed_conv",
    "normed_conv_backward",
    "decay",
    "decay_back",
    "sigmoid_gate",
    "sigmoid_gate_back",
    "gated_norm",
    "gated_norm_back",
    "step",
    "conv_step",
}
SMALL_PRODUCTS = {"merge", "merge back"}


def test_kernels_compile_as_committed():
    """Apart from the tests' process, which may interpret kernels."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    script = Path(compiled_kernels.__file__)
    command = [sys.executable, script, "--some"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_kernels_fit_and_do_not_spill():
    rows = compiled_kernels.committed()
    assert {row.kernel for row in rows} == KERNELS | WITHOUT_PRODUCTS
    for row in rows:
        assert row.spills == 0, row
        assert row.shared <= compiled_kernels.SHARED[row.capability], row
        assert row.wgmma + row.mma > 0 or row.kernel in WITHOUT_PRODUCTS, row
        large = row.K >= 64 and row.kernel not in SMALL_PRODUCTS | WITHOUT_PRODUCTS
        if row.capability == 90 and large:  # 64 rows is the least that wgmma takes
            assert row.wgmma > 0, row


def compile_form(form: tuple[str | None, ...]) -> list[compiled_kernels.Row]:
    """A form of decay, erase and write, in bfloat16 and in float32, whole and packed, grouped."""
    rows = []
    for dtype, channels, packed in ((torch.bfloat16, 128, False), (torch.float32, 64, True)):
        case = compiled_kernels.Case("any", 4, 4, channels, channels, 90)
        x = compiled_kernels.operands(case, 2**16, form, dtype)
        bounds = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
        state = torch.empty(4 if packed else 1, 4, channels, channels, device="meta")
        rows += compiled_kernels.compile_calls(case, x, state, bounds)
    return rows


@pytest.mark.slow
def test_every_form_of_gates_compiles():
    """What the interpreter takes, the compiler may not."""
    forms = list(itertools.product((None, "head", "channel"), repeat=3))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        rows = [row for rows in processes.map(compile_form, forms) for row in rows]
    other_decay = {"prepare_under_head_decay", "gradients_under_head_decay"}
    assert len(rows) == 2 * len(forms) * len((KERNELS | WITHOUT_PRODUCTS) - other_decay)
    for row in rows:
        assert row.shared <= compiled_kernels.SHARED[90], row
        bfloat16 = row.K == 128
        assert row.looped <= 2 or not bfloat16, row
        assert row.spills <= 8 or not bfloat16, row
