"""What compiles a test's code here: backends of torch.compile, and Triton or its interpreter."""

import shutil
from importlib import import_module
from importlib.util import find_spec

import pytest

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    ),
]


def interpreted() -> bool:
    return find_spec("triton") is not None and import_module("triton").knobs.runtime.interpret
