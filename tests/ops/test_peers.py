"""The operator against flash-linear-attention's naive references (`make peers` installs them)."""

import peers
import pytest
import torch
from operator_cases import Case, assert_no_worse, cast, error, make_inputs

from gdn2.ops import gated_delta_rule

pytestmark = pytest.mark.peer

CASES = {
    "gdn2": Case(T=130, K=16, V=24),
    "kda": Case(T=128, erase="head", K=16, V=24),
    "kda_value_groups": Case(T=128, erase="head", HV=4, gates_on_value_heads=True, K=16, V=24),
    "gated_delta_rule": Case("head", "head", T=130, K=16, V=24),
    "simple_gla": Case("head", None, None, T=128, K=16, V=24),
}
FORMS = {"recurrent": "naive_recurrent_{}", "chunk": "naive_chunk_{}"}


def arguments(operator: str, inputs: dict) -> dict:
    """Our names to theirs."""
    theirs = {n: inputs[n] for n in ("q", "k", "v")} | {"g": inputs["log_decay"]}
    if operator == "gdn2":
        return theirs | {"b": inputs["erase"], "w": inputs["write"]}
    return theirs if operator == "simple_gla" else theirs | {"beta": inputs["erase"]}


def results(function, inputs: dict, upstream_seed: int = 7) -> dict:
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items() if x is not None}
    out, state = function(leaves)
    generator = torch.Generator().manual_seed(upstream_seed)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (out, state)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_reference(name, form):
    operator = name.removesuffix("_value_groups")
    file = peers.load_file("fla-core", f"fla/ops/{operator}/naive.py")
    naive = getattr(file, FORMS[form].format(operator))
    inputs = make_inputs(CASES[name])
    # Their chunked forms mask after the exponential: keep the decay within a chunk moderate.
    inputs["log_decay"] *= 0.2
    if operator in ("kda", "gated_delta_rule"):
        inputs.pop("write")
    inputs = cast(inputs, torch.float32)

    def ours(x: dict, backend: str | None = None):
        tied = {"write": x["erase"]} if operator in ("kda", "gated_delta_rule") else {}
        return gated_delta_rule(**x, **tied, scale=0.25, backend=backend)

    def theirs(x: dict):
        call = arguments(operator, x)
        return naive(**call, scale=0.25, initial_state=x["state"], output_final_state=True)

    truth = results(lambda x: ours(x, "reference"), cast(inputs, torch.float64))
    peer = results(theirs, inputs)
    for key in truth:
        assert error(peer[key], truth[key]) < 2e-5, key
    assert_no_worse(results(ours, inputs), than=peer, truth=truth, factor=2.0)
