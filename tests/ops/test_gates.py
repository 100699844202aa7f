import pytest
import torch

from gdn2.ops.gates import gate, log_decay


def test_log_decay_is_its_formula_and_never_positive():
    f = 20 * torch.randn(5, 3, 4, dtype=torch.float64)
    A_log, dt_bias = torch.randn(3, 1, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    got = log_decay(f, A_log, dt_bias)
    torch.testing.assert_close(
        got, -A_log.exp() * torch.log1p((f + dt_bias).exp()), rtol=1e-7, atol=0
    )
    assert (got <= 0).all()


def test_gates_are_float32_inside_whatever_autocast_says():
    x = torch.randn(4, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        decay = log_decay(x, torch.zeros(6), torch.zeros(6))
        erase = gate(x, 2.0)
    assert (decay.dtype, erase.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(erase, (2 * x.float().sigmoid()).bfloat16())


@pytest.mark.parametrize(
    ("f", "A_log", "dt_bias"),
    [
        ((5, 3, 4), (3,), (3, 4)),
        ((5, 3, 4), (3, 1), (3, 1)),
        ((5, 3, 4), (3, 1), (4,)),
        ((5, 3), (3, 1), (3,)),
        ((5, 3), (), (3,)),
        ((4,), (3, 1), (3, 4)),
        ((5, 2, 3, 4), (2, 3, 1), (2, 3, 4)),
    ],
    ids=str,
)
def test_broken_contracts_of_log_decay_are_refused(f, A_log, dt_bias):
    with pytest.raises(ValueError, match=r"f, A_log and dt_bias must be .*, got \["):
        log_decay(torch.zeros(f), torch.zeros(A_log), torch.zeros(dt_bias))


def test_backends_that_can_not_serve_a_gate_are_refused():
    x = torch.zeros(3, dtype=torch.float64)
    for call in (lambda: gate(x, backend="triton"), lambda: log_decay(x, x, x, backend="triton")):
        with pytest.raises(NotImplementedError, match="backend='triton' takes float32"):
            call()
    with pytest.raises(ValueError, match="backend must be None or one of"):
        gate(x, backend="cuda")
