"""The token loop against independent formulas: it is what everything else is compared with."""

from itertools import pairwise

import pytest
import torch
from operator_cases import GATE_FORMS, Case, error, make_inputs

from gdn2.ops import gated_delta_rule


def matrix_product_oracle(q, k, v, log_decay, erase, write, state, scale):
    """Eq. 10 with explicit K x K transitions, one head at a time, gates all channel-wise."""
    B, T, H, K = q.shape
    out = torch.zeros_like(v)
    last = torch.zeros_like(state)
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(T):
                key = k[b, t, h][:, None]
                erasing = (erase[b, t, h] * k[b, t, h])[None, :]
                transition = (torch.eye(K, dtype=q.dtype) - key @ erasing) @ torch.diag(
                    log_decay[b, t, h].exp()
                )
                S = transition @ S + key @ (write[b, t, h] * v[b, t, h])[None, :]
                out[b, t, h] = scale * S.T @ q[b, t, h]
            last[b, h] = S
    return out, last


def as_channels(inputs: dict) -> dict:
    """Absent and per-head gates written out per channel."""
    full = dict(inputs)
    for name, like, absent in (("log_decay", "k", 0.0), ("erase", "k", 0.0), ("write", "v", 1.0)):
        x, like = inputs[name], inputs[like]
        if x is None:
            full[name] = torch.full_like(like, absent)
        elif x.ndim == 3:
            full[name] = x[..., None].expand_as(like)
    return full


@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_loop_is_the_matrix_recurrence(decay, erase, write):
    case = Case(decay, erase, write, T=9, K=5, V=3)
    inputs = make_inputs(case)
    out, state = gated_delta_rule(**inputs, scale=case.scale, backend="reference")
    true_out, true_state = matrix_product_oracle(**as_channels(inputs), scale=case.scale)
    assert error(out, true_out) < 1e-14
    assert error(state, true_state) < 1e-14


@pytest.mark.parametrize("gates_on_value_heads", [False, True])
def test_grouped_value_heads_are_repeated_key_heads(gates_on_value_heads):
    case = Case(H=2, HV=6, T=12, gates_on_value_heads=gates_on_value_heads)
    inputs = make_inputs(case)
    repeated = dict(inputs)
    for name in ("q", "k", "log_decay", "erase"):
        if repeated[name].shape[2] == case.H:
            repeated[name] = repeated[name].repeat_interleave(3, dim=2)
    out, state = gated_delta_rule(**inputs, backend="reference")
    true_out, true_state = gated_delta_rule(**repeated, backend="reference")
    assert error(out, true_out) < 1e-14
    assert error(state, true_state) < 1e-14


def test_equal_gates_recover_kda():
    inputs = make_inputs(Case(erase="head", write=None, T=20))
    beta = inputs["erase"]
    inputs["write"] = beta
    out, _ = gated_delta_rule(**inputs, backend="reference")
    S = inputs["state"]
    for t in range(20):
        q, k, v, g = (inputs[n][:, t] for n in ("q", "k", "v", "log_decay"))
        S = g.exp()[..., None] * S
        S = S + beta[:, t][..., None, None] * torch.einsum(
            "bhk,bhv->bhkv", k, v - torch.einsum("bhk,bhkv->bhv", k, S)
        )
        assert error(out[:, t], torch.einsum("bhk,bhkv->bhv", q, S)) < 1e-13


def test_scalar_decay_and_equal_gates_recover_gated_deltanet():
    inputs = make_inputs(Case("head", "head", None, T=20))
    beta = inputs["erase"]
    inputs["write"] = beta
    out, _ = gated_delta_rule(**inputs, backend="reference")
    S = inputs["state"]
    eye = torch.eye(8, dtype=torch.float64)
    for t in range(20):
        q, k, v = (inputs[n][:, t] for n in ("q", "k", "v"))
        beta_t = beta[:, t][..., None, None]
        alpha_t = inputs["log_decay"][:, t].exp()[..., None, None]
        # Eq. 6 has the decay outside: a scalar commutes with the erase.
        S = alpha_t * (eye - beta_t * k[..., :, None] * k[..., None, :]) @ S
        S = S + beta_t * k[..., :, None] * v[..., None, :]
        assert error(out[:, t], torch.einsum("bhk,bhkv->bhv", q, S)) < 1e-13


def test_no_erase_recovers_mamba2():
    inputs = make_inputs(Case("head", None, "head", T=20))
    out, _ = gated_delta_rule(**inputs, backend="reference")
    g, dt = inputs["log_decay"], inputs["write"]
    total = g.cumsum(1)
    # Eq. 4 unrolled: a masked quadratic form in the inputs, plus the decayed initial state.
    weight = (total[:, :, None] - total[:, None]).exp().permute(0, 3, 1, 2).tril()
    scores = torch.einsum("bthk,bshk->bhts", inputs["q"], inputs["k"]) * weight
    truth = torch.einsum("bhts,bsh,bshv->bthv", scores, dt, inputs["v"])
    truth = truth + torch.einsum("bth,bthk,bhkv->bthv", total.exp(), inputs["q"], inputs["state"])
    assert error(out, truth) < 1e-13


def test_packed_equals_separate():
    bounds = (0, 0, 3, 10, 10, 23)
    case = Case(B=1, T=23, HV=4, cu_seqlens=bounds)
    inputs = make_inputs(case)
    out, state = gated_delta_rule(**inputs, cu_seqlens=torch.tensor(bounds), backend="reference")
    for n, (start, stop) in enumerate(pairwise(bounds)):
        alone = {k: x[n : n + 1] if k == "state" else x[:, start:stop] for k, x in inputs.items()}
        alone_out, alone_state = gated_delta_rule(**alone, backend="reference")
        assert torch.equal(out[:, start:stop], alone_out)
        assert torch.equal(state[n : n + 1], alone_state)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(Case(B=1, T=3, H=1, HV=2, K=2, V=2))
    names, tensors = zip(*((n, x.requires_grad_()) for n, x in inputs.items()), strict=True)

    def function(*tensors):
        return gated_delta_rule(**dict(zip(names, tensors, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, tensors)


def test_half_precision_inputs_are_accumulated_in_float32():
    inputs = make_inputs(Case(), dtype=torch.bfloat16)
    inputs["state"] = inputs["state"].float()
    out, state = gated_delta_rule(**inputs, backend="reference")
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact = {n: x.double() for n, x in inputs.items()}
    assert error(state, gated_delta_rule(**exact, backend="reference")[1]) < 1e-6
