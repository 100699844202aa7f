"""Blocks on the Triton kernels under torch.compile and FSDP2, interpreted or on a GPU."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from compilers import BACKENDS
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from triton_device import DEVICE, MARKS

from gdn2.models.modeling import Block
from gdn2.modules import linear
from gdn2.ops.backends import FASTEST

pytestmark = MARKS


@pytest.fixture
def block(make_config, monkeypatch) -> Block:
    """It asks for the kernels, and joins its maps."""
    monkeypatch.setitem(FASTEST, DEVICE, "triton")
    monkeypatch.setattr(linear, "_pays", lambda _: True)
    torch.manual_seed(0)
    return Block(make_config(["gdn2"], head_k_dim=16, head_v_dim=16), "gdn2").to(DEVICE)


def results(block, x: Tensor, parameters) -> list[Tensor]:
    y, _ = block(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_compiles_whole(backend, block):
    x = torch.randn(2, 20, 24, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    want, got = (results(b, x, block.parameters()) for b in (block, compiled))
    for a, b in zip(want, got, strict=True):
        assert (b - a).abs().max() <= 1e-5 * a.abs().max() + 1e-7


def test_a_sharded_block_in_mixed_precision(block, tmp_path):
    """FSDP2 gives the kernels parameters in half precision, and takes gradients in float32."""
    kind = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(2, 20, 24, device=DEVICE)
        half = deepcopy(block).half()
        y, _ = half(x.half())
        y.float().square().sum().backward()
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
        sharded, _ = block(x)
        sharded.float().square().sum().backward()
        assert torch.equal(sharded, y)
        for (name, p), q in zip(half.named_parameters(), block.parameters(), strict=True):
            assert q.grad.dtype == torch.float32
            difference = (q.grad.full_tensor() - p.grad).abs().max()
            assert difference <= 0.01 * p.grad.abs().max() + 1e-4, name
    finally:
        dist.destroy_process_group()
