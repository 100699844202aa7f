"""The kernels' launches for a call of the operator: buffers, strides and constants."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.contract import Operands
from gdn2.ops.triton.conv_step import conv_step
from gdn2.ops.triton.merge import merge
from gdn2.ops.triton.prepare import prepare_under_channel_decay, prepare_under_head_decay
from gdn2.ops.triton.scan import scan
from gdn2.ops.triton.sizes import Sizes, capability, sizes_of
from gdn2.ops.triton.step import step

_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_CONV_BD = 128


class Pieces(NamedTuple):
    """Pieces of L tokens of all sequences: at most `most`; of packs, the tables of `locate`."""

    most: int
    sequence: Tensor | None
    first: Tensor | None

    @classmethod
    def of(cls, B: int, T: int, cu_seqlens: Tensor | None, L: int) -> "Pieces":
        """Each sequence has at least one. The lengths are not looked at: they may be on a GPU."""
        if cu_seqlens is None:
            return cls(B * max(triton.cdiv(T, L), 1), None, None)
        N = len(cu_seqlens) - 1
        most = T // L + N
        first = torch.zeros_like(cu_seqlens)
        first[1:] = ((cu_seqlens.diff() + L - 1) // L).clamp(min=1).cumsum(0)
        piece = torch.arange(most, dtype=first.dtype, device=first.device)
        sequence = torch.searchsorted(first, piece, right=True).clamp(max=N) - 1
        return cls(most, sequence, first)


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All chunks are prepared at once; then every segment's are scanned in order."""
    (B, T, H, K), (HV, V) = x.q.shape, x.v.shape[2:]
    dtype, device = x.q.dtype, x.q.device
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    forms = _forms(x)
    sizes = _sizes(x, forms)
    chunks = Pieces.of(B, T, cu_seqlens, sizes.C)
    segments = Pieces.of(B, T, cu_seqlens, sizes.L)
    on_value_heads = any(g is not None and g.shape[2] != H for g in (x.log_decay, x.erase))
    P = HV if on_value_heads else H
    arguments = {
        **_arguments(x),
        **forms,
        **_prepared(forms, (chunks.most, P), sizes.C, K, dtype, device),
        **sizes._asdict(),
        "cu_seqlens": cu_seqlens,
        "chunk_sequence": chunks.sequence,
        "first_chunk": chunks.first,
        "segment_sequence": segments.sequence,
        "first_segment": segments.first,
        "starts": None if state is None else state.contiguous(),
        "transfers": None,
        "out": torch.empty(x.v.shape, dtype=dtype, device=device),
        "new_state": torch.empty(N, HV, K, V, dtype=torch.float32, device=device),
        "T": T,
        "scale": scale,
        "P": P,
        "KP": triton.next_power_of_2(K),
        "BK": min(sizes.BK, K & -K),
        "BV": min(sizes.BV, triton.next_power_of_2(V)),
        "LEVELS": sizes.C.bit_length() - 1,
        "HAS_STARTS": state is not None,
        "TRANSFER": False,
        "PACKED": cu_seqlens is not None,
        "DOT": _DOT[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    channel = forms["DECAY"] == 2
    prepare = prepare_under_channel_decay if channel else prepare_under_head_decay
    _launch(prepare, (chunks.most, P), arguments, sizes.prepare_warps)
    if sizes.L < T:
        arguments |= _starts_of_segments(arguments, sizes, (N, segments.most))
    programs = segments.most * HV * triton.cdiv(V, arguments["BV"])
    _launch(scan, (programs,), arguments, sizes.scan_warps, sizes.scan_stages)
    return arguments["out"], arguments["new_state"]


def _prepared(
    forms: dict[str, int],
    rows: tuple[int, int],
    C: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor | None]:
    """Buffers for what the scan needs of chunks, P heads of each: those that a form has."""

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(*rows, *shape, dtype=dtype, device=device) if wanted else None

    channel, head, erase = forms["DECAY"] == 2, forms["DECAY"] == 1, forms["ERASE"] > 0
    return {
        "erased_rows": empty(channel and erase, C, K),
        "query_rows": empty(channel, C, K),
        "columns": empty(channel, C, K),
        "total": empty(channel, K, dtype=torch.float32),
        "prefix": empty(head, C, dtype=torch.float32),
        "suffix": empty(head, C, dtype=torch.float32),
        "inverse": empty(erase, C, C),
        "scores": empty(True, C, C),
    }


def _starts_of_segments(
    arguments: dict[str, Any], sizes: Sizes, counts: tuple[int, int]
) -> dict[str, Any]:
    """The states that segments start from, by what the segments before them do to a state."""
    (N, segments), HV, K, V = counts, *(arguments[name] for name in ("HV", "K", "V"))
    device, BV = arguments["out"].device, arguments["BV"]
    transfers = torch.empty(segments, HV, K, V + K, dtype=torch.float32, device=device)
    starts = torch.empty(segments, HV, K, V, dtype=torch.float32, device=device)
    scanned = arguments | {"TRANSFER": True, "transfers": transfers}
    programs = segments * HV * triton.cdiv(V + K, BV)
    _launch(scan, (programs,), scanned, sizes.scan_warps, sizes.scan_stages)
    merged = scanned | {
        "state": arguments["starts"],
        "starts": starts,
        "HAS_STATE": arguments["HAS_STARTS"],
    }
    _launch(merge, (N * HV * triton.cdiv(V, BV),), merged, sizes.merge_warps)
    return {"starts": starts, "HAS_STARTS": True}


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """`state` is updated in place, through a copy where it does not lie side by side."""
    B, T, HV, V = x.v.shape
    states = state.contiguous()
    out = torch.empty(x.v.shape, dtype=x.q.dtype, device=x.q.device)
    forms = _forms(x)
    sizes = _sizes(x, forms)
    KP, BV = triton.next_power_of_2(x.k.shape[-1]), min(sizes.step_BV, triton.next_power_of_2(V))
    warps = min(sizes.step_warps, KP * BV // 32)  # no two threads have one number of the state
    arguments = {
        **_arguments(x),
        **forms,
        "state": states,
        "state_indices": state_indices,
        "out": out,
        "T": T,
        "scale": scale,
        "KP": KP,
        "BV": BV,
        "INDEXED": state_indices is not None,
    }
    _launch(step, (B * HV * triton.cdiv(V, BV),), arguments, warps)
    if states is not state:
        state.copy_(states)
    return out


def causal_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    state_indices: Tensor | None,
) -> Tensor:
    """Outputs for x [B, T, D]; `state` is updated in place, as in `gated_delta_step`."""
    (B, T, D), W = x.shape, weight.shape[1]
    rows, states = _rows(x), state.contiguous()
    arguments = {
        "x": rows,
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "state": states,
        "state_indices": state_indices,
        "out": torch.empty(x.shape, dtype=x.dtype, device=x.device),
        "T": T,
        "x_stride": rows.stride(1),
        "D": D,
        "W": W,
        "WP": triton.next_power_of_2(W),
        "BD": _CONV_BD,
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "INDEXED": state_indices is not None,
    }
    _launch(conv_step, (B * triton.cdiv(D, _CONV_BD),), arguments, warps=4)
    if states is not state:
        state.copy_(states)
    return arguments["out"]


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


def _sizes(x: Operands, forms: dict[str, int]) -> Sizes:
    decay = "channel" if forms["DECAY"] == 2 else "head"
    K, V = x.q.shape[3], x.v.shape[3]
    return sizes_of(decay, K, V, x.q.dtype, capability(x.q.device))


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
