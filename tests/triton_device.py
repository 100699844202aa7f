"""Where Triton's kernels run in tests: in its interpreter, or on a GPU at larger sizes."""

import pytest
import torch
from compilers import interpreted
from operator_cases import GATE_FORMS, LAYOUTS, Case, make_inputs, put

from gdn2.ops.triton.sizes import INTERPRETER, capability, sizes_of

DEVICE = "cpu" if interpreted() else "cuda"
ON_GPU = DEVICE == "cuda" and torch.cuda.is_available()
MARKS = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not (interpreted() or ON_GPU), reason="needs triton, and a GPU or TRITON_INTERPRET=1"
    ),
]
CAPABILITY = capability(torch.device(DEVICE)) if ON_GPU else INTERPRETER
SIZES = sizes_of("channel", 16, 16, torch.float32, CAPABILITY)
C, L = SIZES.C, SIZES.L
SMALL = {"K": 16, "V": 16}
CHANNELS = [(16, 16), (64, 64), (128, 128), (256, 128)] if ON_GPU else [(16, 16)]


def inputs_of(case: Case, **options) -> dict:
    return put(make_inputs(case, **{"dtype": torch.float32} | options), DEVICE)


def forms_and_layouts(shift: int) -> list:
    """Every form of gates with one layout, each form of decay with all; others for other shifts."""
    layouts = list(LAYOUTS)
    return [(form, layouts[(i + shift) % len(layouts)]) for i, form in enumerate(GATE_FORMS)]
