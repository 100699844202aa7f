"""What every backend is given: the operands of the gated delta rule, checked once at the door."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Operands(NamedTuple):
    """The tensors that a token brings, or their gradients; absent gates are None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Operands":
        """Apply `function` to every tensor that is there."""
        return Operands(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


def in_parts(
    tensors: Iterable[Tensor | None], cut: Callable[[Tensor], Iterable[Tensor]]
) -> Iterator[tuple]:
    """The parts that `cut` makes of every tensor, part by part; None where there is no tensor."""
    return zip(*(repeat(None) if x is None else cut(x) for x in tensors), strict=False)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state and of every accumulation for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_autocast_available = cache(torch.amp.is_autocast_available)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Keep autocast from lowering the precision of products on x's device."""
    kind = x.device.type
    if not (_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()  # to enter and leave autocast takes longer than a small operation
    return torch.autocast(kind, enabled=False)


def check_operands(x: Operands) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of `gated_delta_rule`."""
    q, k, v = x.q, x.k, x.v
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q and v must be [B, T, H, K] and [B, T, HV, V], got {list(q.shape)}, {list(v.shape)}"
        )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must have q's B and T, {list(q.shape[:2])}, got {list(v.shape[:2])}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if min(H, K, HV, V) == 0 or HV % H:
        raise ValueError(
            f"H, K, HV and V must be positive and HV a multiple of H, got H={H}, K={K}, HV={HV}, "
            f"V={V}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    _check_gate("log_decay", x.log_decay, (B, T), {H, HV}, K)
    _check_gate("erase", x.erase, (B, T), {H, HV}, K)
    _check_gate("write", x.write, (B, T), {HV}, V)
    for name, tensor in x._asdict().items():
        if tensor is not None:
            _check_device(name, tensor, q)


def _check_gate(
    name: str, gate: Tensor | None, tokens: tuple[int, int], heads: set[int], channels: int
) -> None:
    if gate is None:
        return
    legal = [shape for h in sorted(heads) for shape in ([*tokens, h], [*tokens, h, channels])]
    if list(gate.shape) not in legal:
        shapes = " or ".join(map(str, legal))
        raise ValueError(f"{name} must have shape {shapes}, got {list(gate.shape)}")
    if not gate.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {gate.dtype}")


def check_boundaries(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """Return the number of sequences N in x [B, T, ...]; reads no values from an accelerator."""
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences along T and needs B == 1, got B={batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be a vector of int32 or int64, got "
            f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    _check_device("cu_seqlens", cu_seqlens, x)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens must hold N + 1 >= 1 boundaries, got none")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens.tolist(), time)
    return cu_seqlens.numel() - 1


def check_bounds(bounds: list[int], time: int) -> None:
    """Raise ValueError unless boundaries rise from 0 to `time`."""
    if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to T={time}, got {bounds}")


def check_state(state: Tensor, slots: int, x: Operands) -> None:
    """Raise ValueError unless `state` holds `slots` states for these operands."""
    shape = [slots, x.v.shape[2], x.q.shape[3], x.v.shape[3]]
    dtype = state_dtype(x.q.dtype)
    if list(state.shape) != shape or state.dtype != dtype:
        raise ValueError(
            f"state must be {shape} {dtype} for {x.q.dtype} inputs, got "
            f"{list(state.shape)} {state.dtype}"
        )
    _check_device("state", state, x.q)


def check_state_indices(state_indices: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `state_indices` holds one integer for each row of x."""
    B = x.shape[0]
    if list(state_indices.shape) != [B] or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"state_indices must be [B] = [{B}] int32 or int64, got "
            f"{list(state_indices.shape)} {state_indices.dtype}"
        )
    _check_device("state_indices", state_indices, x)


def check_first_order() -> None:
    """Refuse second derivatives at the start of a hand-written backward.

    Raises:
        RuntimeError: gradients are being recorded, which torch does in a backward only where
            `create_graph` asks for it; the result would silently count as a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this backward has no gradient of its own (create_graph=True); of the operator, "
            "gated_delta_rule(..., backend='reference') has"
        )


def check_no_tangent(tensors: Iterable[Tensor | None]) -> None:
    """Refuse forward-mode differentiation, which would silently give zeros.

    Raises:
        NotImplementedError: one of `tensors` carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "this has no forward-mode derivative (torch.func.jvp); of the operator, "
            "gated_delta_rule(..., backend='reference') has"
        )


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the inputs' device, {like.device}, got {x.device}")
