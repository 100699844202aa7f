"""The fast-weight view (docs/math.md, section 2): one token is one step on an objective."""

import torch
from operator_cases import Case, error, make_inputs

from gdn2.ops import gated_delta_rule

ONE_HEAD = {"B": 1, "T": 1, "H": 1, "HV": 1, "K": 6, "V": 5}


def one_step(case: Case):
    """The pieces of a single token: decayed state S', key, value, gates, and the state after it."""
    inputs = make_inputs(case)
    _, after = gated_delta_rule(**inputs, backend="reference")
    decay = inputs["log_decay"][0, 0, 0].exp()
    S = (decay[..., None] * inputs["state"][0, 0]).requires_grad_()
    k, v, b, w = (
        None if inputs[n] is None else inputs[n][0, 0, 0] for n in ("k", "v", "erase", "write")
    )
    return S, k, v, b, w, after[0, 0]


def gradient(objective, S):
    return torch.autograd.grad(objective(S), S)[0]


def test_equal_gates_descend_the_squared_error_of_the_recalled_value():  # F1
    S, k, v, beta, _, _ = one_step(Case(erase="head", **ONE_HEAD))
    inputs = make_inputs(Case(erase="head", **ONE_HEAD))
    inputs["write"] = inputs["erase"]
    _, after = gated_delta_rule(**inputs, backend="reference")
    step = gradient(lambda S: (S.T @ k - v).square().sum() / 2, S)
    assert error(S - beta * step, after[0, 0]) < 1e-15


def test_no_erase_descends_a_linear_objective():  # F2
    S, k, v, _, w, after = one_step(Case(erase=None, **ONE_HEAD))
    assert error(S - gradient(lambda S: -(S.T @ k) @ (w * v), S), after) < 1e-15


def test_channel_gates_descend_in_the_metric_of_the_erase_gate():  # F3
    S, k, v, b, w, after = one_step(Case(**ONE_HEAD))
    step = gradient(lambda S: (S.T @ (b * k) - w * v).square().sum() / 2, S)
    assert error(S - step / b[:, None], after) < 1e-14


def test_channel_erase_is_no_euclidean_gradient():  # F3
    case = Case(**ONE_HEAD)
    inputs = make_inputs(case)

    def change(S):
        _, after = gated_delta_rule(**{**inputs, "state": S[None, None]}, backend="reference")
        return after[0, 0] - inputs["log_decay"][0, 0, 0].exp()[:, None] * S

    n = case.K * case.V
    jacobian = torch.autograd.functional.jacobian(change, inputs["state"][0, 0]).reshape(n, n)
    assert (jacobian - jacobian.T).abs().max() > 0.01
    inputs["erase"][:] = 0.7
    inputs["log_decay"][:] = 0.0
    jacobian = torch.autograd.functional.jacobian(change, inputs["state"][0, 0]).reshape(n, n)
    assert (jacobian - jacobian.T).abs().max() < 1e-15


def test_erase_range_two_reaches_minus_one():  # F4
    case = Case(**ONE_HEAD)
    inputs = make_inputs(case)
    inputs["log_decay"][:] = 0.0
    k, b = inputs["k"][0, 0, 0], inputs["erase"][0, 0, 0]
    for erase in (b, b / 2, torch.full_like(b, 2.0), torch.zeros_like(b)):
        transition = torch.eye(case.K, dtype=k.dtype) - torch.outer(k, erase * k)
        eigenvalues = torch.linalg.eigvals(transition)
        assert eigenvalues.imag.abs().max() < 1e-12
        moved = eigenvalues.real[(eigenvalues.real - 1).abs().argmax()]
        assert error(moved, 1 - (erase * k * k).sum()) < 1e-12
        assert -1 - 1e-12 <= moved <= 1 + 1e-12
