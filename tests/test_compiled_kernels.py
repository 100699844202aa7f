"""The Triton kernels compile for GPUs that are not here, as the committed table says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
import compiled_kernels

KERNELS = {
    "prepare_under_channel_decay",
    "prepare_under_head_decay",
    "scan",
    "scan of transfers",
    "merge",
    "step",
    "conv_step",
}
WITHOUT_PRODUCTS = {"step", "conv_step"}


def test_kernels_compile_as_committed():
    """Apart from the tests' process, which may interpret kernels."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    script = Path(compiled_kernels.__file__)
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_kernels_fit_and_do_not_spill():
    rows = compiled_kernels.committed()
    assert {row.kernel for row in rows} == KERNELS
    for row in rows:
        assert row.spills == 0, row
        assert row.shared <= compiled_kernels.SHARED[row.capability], row
        assert row.wgmma + row.mma > 0 or row.kernel in WITHOUT_PRODUCTS, row
        if row.capability == 90 and row.kernel not in {"merge", *WITHOUT_PRODUCTS}:
            assert row.wgmma > 0, row
