"""Backends of torch.compile that a test runs with: the second where there is a C++ compiler."""

import shutil

import pytest

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    ),
]
