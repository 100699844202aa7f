"""Inputs for the operator's tests, and the one gate that every comparison with the truth passes."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops import chunked, gated_delta_rule

C = chunked.CHUNK
PYTORCH_BACKENDS = ("chunked", "reference")
FORMS = (None, "head", "channel")
GATE_FORMS = list(itertools.product(FORMS, FORMS, FORMS))  # decay, erase, write
MEMBERS = {
    "gdn2": ("channel", "channel", "channel"),
    "kda": ("channel", "head", "head"),
    "gated_deltanet": ("head", "head", "head"),
    "deltanet": (None, "head", "head"),
    "mamba2": ("head", None, "head"),  # Mamba-3 too
}
LAYOUTS = {
    "batch": {"B": 2, "T": 2 * C + 7},
    "value_groups": {"B": 1, "T": C + 5, "H": 2, "HV": 4},
    "gates_on_value_heads": {"B": 2, "T": C + 5, "H": 1, "HV": 3, "gates_on_value_heads": True},
    "packed": {"B": 1, "T": 3 * C, "HV": 4, "cu_seqlens": (0, 0, 5, C + 5, 2 * C, 3 * C, 3 * C)},
}


@dataclass(frozen=True)
class Case:
    """A call of the operator: gate forms and sizes; gates on key or on value heads."""

    decay: str | None = "channel"
    erase: str | None = "channel"
    write: str | None = "channel"
    B: int = 2
    T: int = 70
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 8
    gates_on_value_heads: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    scale: float = 0.3

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def make_inputs(case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """Random arguments of `gated_delta_rule`, ready for autograd: unit keys, erase up to 2."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def gate(form: str | None, heads: int, channels: int) -> Tensor | None:
        if form is None:
            return None
        return rand(case.B, case.T, heads, *((channels,) if form == "channel" else ()))

    heads = case.HV if case.gates_on_value_heads else case.H
    decay = gate(case.decay, heads, case.K)
    erase = gate(case.erase, heads, case.K)
    inputs = {
        "q": randn(case.B, case.T, case.H, case.K),
        "k": F.normalize(randn(case.B, case.T, case.H, case.K), dim=-1),
        "v": randn(case.B, case.T, case.HV, case.V),
        "log_decay": None if decay is None else -4 * decay**4,
        "erase": None if erase is None else 2 * erase,
        "write": gate(case.write, case.HV, case.V),
        "state": randn(case.N, case.HV, case.K, case.V),
    }
    return {name: x if x is None else x.to(dtype) for name, x in inputs.items()}


def extreme_inputs(name: str, case: Case) -> dict:
    inputs = make_inputs(case)
    log_decay, erase = inputs["log_decay"], inputs["erase"]
    if name.startswith("decay"):
        log_decay[:] = float(name.removeprefix("decay "))
    elif name.startswith("erase"):
        erase[:] = float(name.removeprefix("erase "))
    elif name == "mixed decays":
        log_decay[..., ::4] = -1e4
        log_decay[..., 1::4] = 0.0
        log_decay[..., 2::4] = -20.0
    elif name == "bursts":
        log_decay[:] = 0.0
        log_decay[:, 5::9] = -1e4
    elif name == "no write":
        inputs["write"].zero_()
    elif name == "zero keys":
        inputs["k"].zero_()
    elif name == "equal keys":
        inputs["k"][:] = inputs["k"][:, :1]
        log_decay.zero_()
        erase[:] = 1.93
    return inputs


EXTREMES = (
    *(f"decay {x}" for x in ("0", "-1e-6", "-20", "-50", "-90", "-1e4")),
    *(f"erase {x}" for x in ("0", "1", "2")),
    *("mixed decays", "bursts", "no write", "zero keys", "equal keys"),
)


def put(inputs: dict, device: str) -> dict:
    return {name: x if x is None else x.to(device) for name, x in inputs.items()}


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """The same numbers in another dtype; states of half precision calls are float32."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: x if x is None else x.detach().to(state_dtype if name == "state" else dtype)
        for name, x in inputs.items()
    }


@contextmanager
def rounded_products(dtype: torch.dtype) -> Iterator[None]:
    """The chunked backend rounds the operands of every product to `dtype`; sums stay float32."""

    def rounded(product: Callable) -> Callable:
        def run(*arguments, **options):
            *before, a, b = arguments
            return product(*before, a.to(dtype).float(), b.to(dtype).float(), **options)

        return run

    places = [(torch, "bmm"), (torch, "baddbmm"), (torch, "matmul"), (Tensor, "baddbmm_")]
    with ExitStack() as stack:
        for owner, name in places:
            product = rounded(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, product))
        yield


def run(
    inputs: dict,
    case: Case,
    *,
    backend: str | None = None,
    upstream_until: int | None = None,
    rule: Callable = gated_delta_rule,
) -> dict[str, Tensor]:
    """Outputs, final state and all gradients of a fixed random loss on both.

    With `upstream_until` the loss sees only the outputs before that position, and not the state.
    """
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items() if x is not None}
    device = inputs["q"].device
    cu_seqlens = case.cu_seqlens and torch.tensor(case.cu_seqlens, device=device)
    out, state = rule(**leaves, scale=case.scale, cu_seqlens=cu_seqlens, backend=backend)
    generator = torch.Generator().manual_seed(99)
    d_out, d_state = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device)
        for x in (out, state)
    )
    if upstream_until is None:
        loss = (out.double() * d_out).sum() + (state.double() * d_state).sum()
    else:
        loss = (out.double() * d_out)[:, :upstream_until].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "new_state": state.detach(), **named}


def error(got: Tensor, truth: Tensor, size: float | None = None) -> float:
    """Largest difference relative to `size`, by default the largest true entry; NaN is infinite."""
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - truth.double()).abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / max(size if size is not None else largest(truth), 1e-20)


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def natural_sizes(truth: dict[str, Tensor], inputs: dict) -> dict[str, float]:
    """What each result's error is measured against where decay is so strong that its own gradient
    vanishes: log_decay's is then a difference of terms of the size of k * d_k.
    """
    sizes = {name: largest(x) for name, x in truth.items()}
    if "d_log_decay" in sizes:
        sizes["d_log_decay"] = max(sizes["d_log_decay"], largest(inputs["k"] * truth["d_k"]))
    return sizes


def assert_no_worse(
    got: dict[str, Tensor],
    *,
    than: dict[str, Tensor],
    truth: dict[str, Tensor],
    factor: float,
    sizes: dict[str, float] | None = None,
) -> None:
    """Every result's error against the truth is at most `factor` times that of `than`.

    Errors below the dtype's own resolution (4 units in the last place) are equal.
    """
    assert got.keys() == truth.keys() == than.keys()
    for name, true in truth.items():
        size = largest(true) if sizes is None else sizes[name]
        resolution = 4 * torch.finfo(than[name].dtype).eps
        allowed = factor * max(error(than[name], true, size), resolution)
        worst = error(got[name], true, size)
        assert worst <= allowed, f"{name}: error {worst:.2e}, allowed {allowed:.2e}"


def assert_rounded_no_worse(
    got: dict[str, Tensor], *, than: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Half precision: every result's error is at most 1.5 times that of `than`, root mean square.

    Where two algorithms round different things, the largest error of one draw is luck.
    """
    assert got.keys() == truth.keys() == than.keys()
    for name, true in truth.items():
        mine, other = (
            (x[name].double() - true.double()).square().mean().sqrt().item() for x in (got, than)
        )
        assert mine <= 1.5 * other, f"{name}: error {mine:.2e}, {mine / other:.2f} of {other:.2e}"


def assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert torch.equal(a, b), f"{what} differ by up to {(a.double() - b.double()).abs().max():.2e}"
