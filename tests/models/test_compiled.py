"""Blocks under torch.compile and under FSDP2: the same numbers as without."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from compilers import BACKENDS
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from gdn2.models import loss
from gdn2.models.modeling import Block, Gdn2ForCausalLM


def assert_close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max() + 1e-7


AOT_EAGER, INDUCTOR = BACKENDS
CASES = [  # inductor takes many seconds of each
    *((mixer, AOT_EAGER) for mixer in ("gdn2", "mamba2", "mamba3")),
    pytest.param("gdn2", *INDUCTOR.values, marks=INDUCTOR.marks),
]


@pytest.mark.parametrize(("mixer", "backend"), CASES)
def test_a_block_compiles_whole(mixer, backend, make_config):
    torch.manual_seed(0)
    block = Block(make_config([mixer]), mixer)
    x = torch.randn(2, 40, 24, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    results = []
    for f in (block, compiled):
        y, _ = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for want, got in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(("mixer", "backend"), CASES)
def test_a_decode_step_compiles_whole(mixer, backend, make_config):
    torch.manual_seed(0)
    block = Block(make_config([mixer]), mixer).eval()
    with torch.no_grad():
        _, state = block(torch.randn(3, 20, 24))
        torch._dynamo.reset()
        compiled = torch.compile(block.step, backend=backend, fullgraph=True)
        other = deepcopy(state)
        for x in torch.randn(3, 3, 24):
            y, state = block.step(x, state)
            got, other = compiled(x, other)
            assert_close(got, y)
    for got, want in zip(other, state, strict=True):
        assert_close(got, want)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_has_the_same_gradients(make_config):
    torch.manual_seed(0)
    model = Gdn2ForCausalLM(make_config(["gdn2", "sliding_attention"]))
    sharded = deepcopy(model)
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    tokens = torch.randint(0, 60, (2, 40))
    bounds = torch.tensor([0, 13, 80])
    for cu_seqlens in (None, bounds):
        ids = tokens if cu_seqlens is None else tokens.view(1, -1)
        for m in (model, sharded):
            m.zero_grad()
            m(input_ids=ids, cu_seqlens=cu_seqlens).logits.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), sharded.parameters(), strict=True):
            assert p.grad is not None, name
            assert_close(q.grad.full_tensor(), p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_compiles_whole(backend):
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(0, 30, (50,))
    labels[3] = -100
    torch.library.opcheck(loss._linear_cross_entropy, (hidden, weight, labels, True))
    torch._dynamo.reset()
    compiled = torch.compile(loss.linear_cross_entropy, backend=backend, fullgraph=True)
    results = []
    for f in (loss.linear_cross_entropy, compiled):
        total = f(hidden, weight, labels)
        results.append([total, *torch.autograd.grad(2 * total, [hidden, weight])])
    for want, got in zip(*results, strict=True):
        assert_close(got, want)
