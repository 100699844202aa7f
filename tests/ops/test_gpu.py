"""The operator on a CUDA device (`make test-gpu`)."""

import pytest
import torch
from operator_cases import GATE_FORMS, Case, assert_no_worse, cast, make_inputs, run

from gdn2.ops import BACKENDS, gated_delta_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
LAYOUTS = {
    "ragged": {"B": 2, "T": 107},
    "value_groups": {"B": 1, "T": 40, "HV": 4, "gates_on_value_heads": True},
    "packed": {"B": 1, "T": 96, "cu_seqlens": (0, 5, 5, 70, 96)},
}


def on_device(inputs: dict) -> dict:
    return {name: x if x is None else x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_equals_the_token_loop(decay, erase, write, layout, backend):
    case = Case(decay, erase, write, K=32, V=32, **LAYOUTS[layout])
    inputs = cast(make_inputs(case), torch.float32)
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    loop = run(inputs, case, backend="reference")
    got = {name: x.cpu() for name, x in run(on_device(inputs), case, backend=backend).items()}
    assert_no_worse(got, than=loop, truth=truth, factor=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_on_a_pool(backend):
    case = Case(B=3, T=2, K=16, V=16)
    inputs = on_device(make_inputs(case, dtype=torch.float32))
    pool = inputs.pop("state")
    indices = torch.tensor([2, -1, 0], dtype=torch.int32, device="cuda")
    out, _ = gated_delta_step(**inputs, state=pool, state_indices=indices, backend=backend)
    assert not out[1].any()
    assert out[[0, 2]].isfinite().all()
