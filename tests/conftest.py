import pytest
import torch
from compilers import interpreted

from gdn2.ops import triton


@pytest.fixture(autouse=True)
def _rounding_as_on_a_gpu():
    if interpreted():
        from tensor_cores import tensor_cores

        with tensor_cores():
            yield
    else:
        yield


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request, monkeypatch):
    """With that rounding the interpreter may be trusted with bfloat16, which else is refused."""
    if interpreted():
        monkeypatch.setattr(triton, "_problem_here", lambda *_: None)
    return request.param
