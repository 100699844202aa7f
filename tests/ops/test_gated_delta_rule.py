"""The public contract: what is refused, which backend serves, and single-token steps."""

import pytest
import torch
from operator_cases import GATE_FORMS, PYTORCH_BACKENDS, Case, error, make_inputs, run

from gdn2.ops import gated_delta_rule, gated_delta_step, resolve_backend, step
from gdn2.ops.contract import Operands


@pytest.mark.parametrize("name", PYTORCH_BACKENDS)
def test_named_backend_is_used(name):
    x = Operands(*(make_inputs(Case())[name] for name in Operands._fields))
    assert resolve_backend(name, x) == name


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cuda'"):
        gated_delta_rule(**make_inputs(Case()), backend="cuda")


BROKEN = {
    "rank": (lambda x: x.update(q=x["q"][0]), "q and v must be"),
    "key shape": (lambda x: x.update(k=x["k"][..., :3]), "k must have the shape of q"),
    "value length": (lambda x: x.update(v=x["v"][:, 1:]), "v must have q's B and T"),
    "head ratio": (lambda x: x.update(v=x["v"][:, :, [0, 1, 1]]), "HV a multiple of H"),
    "integer": (lambda x: x.update({n: x[n].int() for n in "qkv"}), "one floating dtype"),
    "mixed dtype": (lambda x: x.update(v=x["v"].float()), "share one floating dtype"),
    "decay shape": (
        lambda x: x.update(log_decay=x["log_decay"][..., :2]),
        r"log_decay must have shape \[2, 70, 2\] or \[2, 70, 2, 8\], got \[2, 70, 2, 2\]",
    ),
    "erase heads": (lambda x: x.update(erase=x["erase"][:, :, :1]), "erase must have shape"),
    "write rank": (lambda x: x.update(write=x["write"][0]), "write must have shape"),
    "gate dtype": (lambda x: x.update(erase=x["erase"].int()), "erase must have a floating"),
    "state dtype": (
        lambda x: x.update(state=x["state"].float()),
        r"state must be .* torch.float64 for",
    ),
    "state shape": (lambda x: x.update(state=x["state"][:1]), "state must be"),
    "device": (lambda x: x.update(erase=x["erase"].to("meta")), "erase must be on"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_contract_is_named(what):
    inputs = make_inputs(Case())
    breaks, message = BROKEN[what]
    breaks(inputs)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**inputs)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 70], [0, 50, 40, 70], [0.0, 70.0], [[0, 70]], []])
def test_broken_boundaries_are_named(bounds):
    inputs = make_inputs(Case(B=1))
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gated_delta_rule(**inputs, cu_seqlens=torch.tensor(bounds))


def test_packing_needs_one_row():
    with pytest.raises(ValueError, match="needs B == 1, got B=2"):
        gated_delta_rule(**make_inputs(Case()), cu_seqlens=torch.tensor([0, 70]))


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
def test_autocast_does_not_reach_the_operator(backend):
    case = Case(T=40)
    inputs = make_inputs(case, dtype=torch.float32)
    plain = run(inputs, case, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(inputs, case, backend=backend)
    # The token loop's backward is autograd's own, and runs under the caller's autocast.
    names = plain if backend == "chunked" else ("out", "new_state")
    for name in names:
        assert torch.equal(plain[name], cast[name]), name
    state, last = inputs.pop("state"), {n: x[:, 0] for n, x in inputs.items() if n != "state"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = gated_delta_step(**last, state=state.clone(), backend=backend)
    assert torch.equal(out, gated_delta_step(**last, state=state, backend=backend)[0])


def step_by_step(inputs: dict, case: Case, backend: str, tokens: int):
    """Outputs of a whole sequence fed to the step in pieces of `tokens`; 0 drops the T axis."""
    state, outs = inputs["state"].clone(), []
    for t in range(0, case.T, max(tokens, 1)):
        piece = t if tokens == 0 else slice(t, t + tokens)
        arguments = {n: x if x is None else x[:, piece] for n, x in inputs.items() if n != "state"}
        out, same = gated_delta_step(**arguments, scale=case.scale, state=state, backend=backend)
        assert same is state
        outs.append(out.unsqueeze(1) if tokens == 0 else out)
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_step_equals_sequence(decay, erase, write, grouped, backend):
    heads = {"H": 2, "HV": 4, "gates_on_value_heads": decay == "head"} if grouped else {}
    case = Case(decay, erase, write, T=9, **heads)
    inputs = make_inputs(case)
    true_out, true_state = gated_delta_rule(**inputs, scale=case.scale, backend="reference")
    for tokens in (0, 1, 4):
        out, state = step_by_step(inputs, case, backend, tokens)
        assert error(out, true_out) < 1e-13
        assert error(state, true_state) < 1e-13


@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_step_does_not_depend_on_the_batch_or_on_what_fits_the_cache(
    decay, erase, write, monkeypatch
):
    inputs = make_inputs(Case(decay, erase, write, B=3, T=2, H=3, HV=3), dtype=torch.float32)
    state = inputs.pop("state")
    one_state, one = state[1:2].clone(), {n: x if x is None else x[1:2] for n, x in inputs.items()}
    one_out, _ = gated_delta_step(**one, state=one_state)
    for fitting in (9, 5, 2, 0):  # of 9 states
        monkeypatch.setattr(step, "_CACHED", fitting * state[0, 0].numel() or 1)
        now = state.clone()
        out, _ = gated_delta_step(**inputs, state=now)
        assert torch.equal(out[1:2], one_out)
        assert torch.equal(now[1:2], one_state)


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
def test_step_updates_a_strided_state_in_place(backend):
    inputs = make_inputs(Case(T=2, HV=4))
    state = inputs.pop("state")
    strided = state.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    out, _ = gated_delta_step(**inputs, state=state, backend=backend)
    assert torch.equal(gated_delta_step(**inputs, state=strided, backend=backend)[0], out)
    assert torch.equal(strided, state)


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
@pytest.mark.parametrize("size", ["B", "T"])
def test_step_of_nothing(size, backend):
    case = Case(**({"T": 2} | {size: 0}))
    inputs = make_inputs(case)
    before = inputs["state"].clone()
    out, state = gated_delta_step(**inputs, backend=backend)
    assert out.shape == inputs["v"].shape
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_continues_a_prefill(backend, dtype):
    case = Case(T=80)
    inputs = make_inputs(case, dtype=torch.float32)
    inputs = {n: x if n == "state" else x.to(dtype) for n, x in inputs.items()}
    whole, last = gated_delta_rule(**inputs, scale=case.scale)
    before = {n: x if n == "state" else x[:, :70] for n, x in inputs.items()}
    _, state = gated_delta_rule(**before, scale=case.scale)
    after = {n: x[:, 70:] for n, x in inputs.items() if n != "state"}
    out, state = gated_delta_step(**after, scale=case.scale, state=state, backend=backend)
    assert out.dtype == dtype
    assert error(out, whole[:, 70:]) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert error(state, last) < 1e-6


@pytest.mark.parametrize("backend", PYTORCH_BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_step_on_a_pool_touches_only_its_slots(backend, index_dtype):
    case = Case(B=3, T=2)
    inputs = make_inputs(case)
    rows = inputs.pop("state")
    pool = torch.randn(6, *rows.shape[1:], dtype=rows.dtype)
    indices = torch.tensor([4, -1, 1], dtype=index_dtype)
    expected = pool.clone()
    true_out, true_state = gated_delta_rule(**inputs, state=pool[[4, 0, 1]], backend="reference")
    expected[[4, 1]] = true_state[[0, 2]]
    out, same = gated_delta_step(**inputs, state=pool, state_indices=indices, backend=backend)
    assert same is pool
    assert error(pool, expected) < 1e-14
    assert torch.equal(pool[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
    assert error(out[[0, 2]], true_out[[0, 2]]) < 1e-14
    assert not out[1].any()


def test_step_refuses_gradients():
    inputs = {n: x[:, 0] if n != "state" else x for n, x in make_inputs(Case()).items()}
    inputs["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        gated_delta_step(**inputs)


def test_step_refuses_many_tokens():
    with pytest.raises(ValueError, match="at most 16 tokens, got 70"):
        gated_delta_step(**make_inputs(Case()))


def test_step_refuses_bad_indices():
    inputs = {n: x[:, :1] if n != "state" else x for n, x in make_inputs(Case()).items()}
    with pytest.raises(ValueError, match=r"state_indices must be \[B\] = \[2\]"):
        gated_delta_step(**inputs, state_indices=torch.tensor([0]))
