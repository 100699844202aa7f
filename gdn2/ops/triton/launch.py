"""The kernels' launches for a call of the operator: buffers, strides and constants."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.contract import Operands
from gdn2.ops.triton.prepare import prepare_under_channel_decay, prepare_under_head_decay
from gdn2.ops.triton.scan import scan
from gdn2.ops.triton.sizes import capability, sizes_of
from gdn2.ops.triton.step import step

_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_STEP_BV = 32


class Chunks(NamedTuple):
    """Where chunks are: `most` of them at most, and of packed sequences the tables of `locate`."""

    most: int
    chunk_sequence: Tensor | None
    first_chunk: Tensor | None

    @classmethod
    def of(cls, B: int, T: int, cu_seqlens: Tensor | None, C: int) -> "Chunks":
        if cu_seqlens is None:
            return cls(B * triton.cdiv(T, C), None, None)
        N = len(cu_seqlens) - 1
        most = triton.cdiv(T, C) + N  # at most: the lengths are not looked at
        first_chunk = torch.zeros_like(cu_seqlens)
        first_chunk[1:] = ((cu_seqlens.diff() + C - 1) // C).cumsum(0)
        chunk = torch.arange(most, device=cu_seqlens.device)
        chunk_sequence = torch.searchsorted(first_chunk, chunk, right=True).clamp(max=N) - 1
        return cls(most, chunk_sequence, first_chunk)


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All chunks are prepared at once, then every sequence's are scanned in order."""
    (B, T, H, K), (HV, V) = x.q.shape, x.v.shape[2:]
    dtype, device = x.q.dtype, x.q.device
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    out = torch.empty(x.v.shape, dtype=dtype, device=device)
    new_state = torch.empty(N, HV, K, V, dtype=torch.float32, device=device)
    sizes = sizes_of(K, dtype, capability(device))
    chunks = Chunks.of(B, T, cu_seqlens, sizes.C)
    on_value_heads = any(g is not None and g.shape[2] != H for g in (x.log_decay, x.erase))
    P = HV if on_value_heads else H
    forms = _forms(x)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(chunks.most, P, *shape, dtype=dtype, device=device)

    C, f32 = sizes.C, torch.float32
    under_channel_decay = forms["DECAY"] == 2
    prepared: dict[str, Tensor | None] = dict.fromkeys(
        ("erased_rows", "query_rows", "columns", "total", "prefix", "suffix")
    )
    prepared |= {"scores": empty(C, C), "inverse": empty(C, C) if forms["ERASE"] else None}
    if under_channel_decay:
        prepared |= {
            "query_rows": empty(C, K),
            "columns": empty(C, K),
            "total": empty(K, dtype=f32),
        }
        prepared |= {"erased_rows": empty(C, K) if forms["ERASE"] else None}
    elif forms["DECAY"]:
        prepared |= {"prefix": empty(C, dtype=f32), "suffix": empty(C, dtype=f32)}
    arguments = {
        **_arguments(x),
        **forms,
        **prepared,
        **chunks._asdict(),
        **sizes._asdict(),
        "cu_seqlens": cu_seqlens,
        "state": None if state is None else state.contiguous(),
        "out": out,
        "new_state": new_state,
        "T": T,
        "scale": scale,
        "P": P,
        "KP": triton.next_power_of_2(K),
        "BK": min(sizes.BK, K & -K),
        "BV": min(sizes.BV, triton.next_power_of_2(V)),
        "LEVELS": C.bit_length() - 1,
        "HAS_STATE": state is not None,
        "PACKED": cu_seqlens is not None,
        "DOT": _DOT[dtype],
        "PRECISION": "tf32x3" if dtype == f32 else "tf32",
    }
    prepare = prepare_under_channel_decay if under_channel_decay else prepare_under_head_decay
    _launch(prepare, (chunks.most, P), arguments, sizes.prepare_warps)
    programs = N * HV * triton.cdiv(V, arguments["BV"])
    _launch(scan, (programs,), arguments, sizes.scan_warps, sizes.scan_stages)
    return out, new_state


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """`state` is updated in place, through a copy where it does not lie side by side."""
    B, T, HV, V = x.v.shape
    states = state.contiguous()
    out = torch.empty(x.v.shape, dtype=x.q.dtype, device=x.q.device)
    BV = min(_STEP_BV, triton.next_power_of_2(V))
    arguments = {
        **_arguments(x),
        **_forms(x),
        "state": states,
        "state_indices": state_indices,
        "out": out,
        "T": T,
        "scale": scale,
        "KP": triton.next_power_of_2(x.k.shape[-1]),
        "BV": BV,
        "INDEXED": state_indices is not None,
    }
    _launch(step, (B * HV * triton.cdiv(V, BV),), arguments, warps=4)
    if states is not state:
        state.copy_(states)
    return out


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int = 1
) -> None:
    """Each kernel takes what it names; nothing is launched on an empty grid."""
    if 0 not in grid:
        mine = {name: arguments[name] for name in kernel.arg_names}
        with torch.cuda.device_of(arguments["out"]):  # Triton launches on the current device
            kernel[grid](**mine, num_warps=warps, num_stages=stages)


def _arguments(x: Operands) -> dict[str, Any]:
    x = x.map(_rows)
    strides = {f"{name}_stride": 0 if t is None else t.stride(1) for name, t in x._asdict().items()}
    heads = {
        f"{name.upper()}_HEADS": t.shape[2] for name, t in x._asdict().items() if t is not None
    }
    return {
        **x._asdict(),
        **strides,
        "LOG_DECAY_HEADS": 1,
        "ERASE_HEADS": 1,
        **heads,
        "H": x.q.shape[2],
        "HV": x.v.shape[2],
        "K": x.q.shape[3],
        "V": x.v.shape[3],
    }


def _forms(x: Operands) -> dict[str, int]:
    """0 absent, 1 per head, 2 per channel."""
    gates = {"DECAY": x.log_decay, "ERASE": x.erase, "WRITE": x.write}
    return {name: 0 if gate is None else gate.ndim - 2 for name, gate in gates.items()}


def _rows(x: Tensor) -> Tensor:
    """Tokens at one stride, the heads and channels of each side by side: x itself if it is so."""
    B, T = x.shape[:2]
    if x.numel() and x[0, 0].is_contiguous() and (B == 1 or x.stride(0) == T * x.stride(1)):
        return x
    return x.contiguous()
