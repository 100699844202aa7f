import torch
import torch.nn.functional as F

from gdn2.modules import SwiGLU


def test_swiglu_is_its_formula():
    mlp = SwiGLU(6, 10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
