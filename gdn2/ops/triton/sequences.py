"""Launches for sequences: the rule and its gradients. Between the two only the inputs are kept."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.contract import Operands
from gdn2.ops.triton.gradients import (
    gradients_under_channel_decay,
    gradients_under_head_decay,
)
from gdn2.ops.triton.launch import describe, launch, sizes_for
from gdn2.ops.triton.layout import pieces, rows
from gdn2.ops.triton.merge import merge
from gdn2.ops.triton.prepare import prepare_under_channel_decay, prepare_under_head_decay
from gdn2.ops.triton.scan import scan
from gdn2.ops.triton.scan_back import scan_back

_ONLY_FOR_SCANS = ("erased_rows", "query_rows", "columns", "inverse", "scores")
_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All chunks are prepared at once; then all segments are scanned, each in order."""
    call = _Call(x, scale, cu_seqlens)
    out = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    new_state = call.empty(call.N, *call.of_state)
    call.scan(scan, "outputs", state, out=out, new_state=new_state)
    return out, new_state


def gated_delta_rule_backward(
    x: Operands,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor | None,
) -> tuple[Operands, Tensor | None]:
    """Gradients of the operands and of the state, from those of the outputs and new states.

    The chunks and the state before each are found again; the scan back leaves the gradient of the
    state after each; and with both all chunks are differentiated at once.
    """
    call = _Call(x, scale, cu_seqlens)
    (HV, K, V), C, chunks = call.of_state, call.sizes.C, call.chunks
    # Of every chunk: the state before it, what is written, and the gradients after it and of that.
    states, dstates = (call.empty(chunks, HV, K, V, dtype=x.q.dtype) for _ in range(2))
    written, dwritten = (call.empty(chunks, HV, C, V, dtype=x.q.dtype) for _ in range(2))
    dout = rows(dout)
    dstart = None if state is None else call.empty(call.N, *call.of_state)
    left: dict[str, Any] = {"states": states, "written": written}
    back = {"dstates": dstates, "dwritten": dwritten, "dout": dout, "dout_stride": dout.stride(1)}
    call.scan(scan, "states", state, **left)
    call.scan(scan_back, "gradients", dstate, **back, dstart=dstart)
    return call.gradients(left | back), dstart


class _Call:
    """A call's chunks, prepared, and what is launched over them."""

    def __init__(self, x: Operands, scale: float, cu_seqlens: Tensor | None) -> None:
        (B, T, H, K), (HV, V) = x.q.shape, x.v.shape[2:]
        on_value_heads = any(g is not None and g.shape[2] != H for g in (x.log_decay, x.erase))
        self.x, self.sizes, self.of_state = x, sizes_for(x), (HV, K, V)
        self.N = B if cu_seqlens is None else len(cu_seqlens) - 1
        self.P = HV if on_value_heads else H
        self.chunks = pieces(B, T, cu_seqlens, self.sizes.C)
        self.segments = pieces(B, T, cu_seqlens, self.sizes.L)
        self.arguments = {
            **describe(x),
            **self.sizes._asdict(),
            "cu_seqlens": cu_seqlens,
            "N": self.N,
            "PACKED": cu_seqlens is not None,
            "T": T,
            "scale": scale,
            "P": self.P,
            "KP": triton.next_power_of_2(K),
            "BK": min(self.sizes.prepare_BK, K & -K),
            "LEVELS": self.sizes.C.bit_length() - 1,
            "DOT": _DOT[x.q.dtype],
            **dict.fromkeys(("out", "new_state", "states", "written", "transfers")),
        }
        self._prepare()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.q.device)

    def _prepare(self) -> None:
        """What scans need of chunks, P heads of each: those tensors that a form has."""
        C, K, DECAY = self.sizes.C, self.of_state[1], self.arguments["DECAY"]
        channel, head, erase = DECAY == 2, DECAY == 1, self.arguments["ERASE"] > 0

        def empty(wanted: bool, *shape: int, dtype: torch.dtype = self.x.q.dtype) -> Tensor | None:
            return self.empty(self.chunks, self.P, *shape, dtype=dtype) if wanted else None

        self.arguments |= {
            "erased_rows": empty(channel and erase, C, K),
            "query_rows": empty(channel, C, K),
            "columns": empty(channel, C, K),
            "total": empty(channel, K, dtype=torch.float32),
            "prefix": empty(head, C, dtype=torch.float32),
            "suffix": empty(head, C, dtype=torch.float32),
            "inverse": empty(erase, C, C),
            "scores": empty(True, C, C),
        }
        prepare = prepare_under_channel_decay if channel else prepare_under_head_decay
        grid = (self.chunks, self.P)
        launch(prepare, grid, self.arguments, self.sizes.prepare_warps)

    def scan(self, kernel: Any, find: str, state: Tensor | None, **found: Any) -> None:
        """Scan all segments, forth from `state` or back from its gradient, to fill `found`.

        Where a sequence may have several, an earlier launch finds what each does to a state, and
        `merge` from that the states which they start from.
        """
        (HV, K, V), sizes, segments = self.of_state, self.sizes, self.segments
        back = kernel is scan_back
        BV, warps, stages = (
            (sizes.back_BV, sizes.back_warps, sizes.back_stages)
            if back
            else (sizes.BV, sizes.scan_warps, sizes.scan_stages)
        )
        BV = min(BV, triton.next_power_of_2(V))
        state = None if state is None else state.contiguous()
        arguments = self.arguments | {"BV": BV, "starts": state, "FIND": find} | found

        def launch_scan(columns: int) -> None:
            arguments["HAS_STARTS"] = arguments["starts"] is not None
            programs = segments * HV * triton.cdiv(columns, BV)
            launch(kernel, (programs,), arguments, warps, stages)

        if arguments["T"] > sizes.L:
            transfers = self.empty(segments, HV, K, V + K)
            arguments |= {"FIND": "transfers", "transfers": transfers}
            launch_scan(V + K)
            starts = self.empty(segments, HV, K, V)
            arguments |= {"FIND": find, "starts": starts}
            merging = arguments | {"state": state, "HAS_STATE": state is not None, "BACK": back}
            merging["BK"] = min(sizes.merge_BK, K & -K)
            launch(merge, (self.N * HV * triton.cdiv(V, BV),), merging, sizes.merge_warps)
        launch_scan(V)

    def gradients(self, left: dict[str, Any]) -> Operands:
        """Of all operands, from what the scans left; those of shared heads are summed."""
        x, P, (_, K, V) = self.x, self.P, self.of_state

        def buffer(t: Tensor) -> Tensor:
            if t.shape[2] in (P, x.v.shape[2]):
                return self.empty(*t.shape, dtype=t.dtype)
            return self.empty(*t.shape[:2], P, *t.shape[3:])

        def of_heads(grad: Tensor, t: Tensor) -> Tensor:
            if grad.shape == t.shape:
                return grad
            return grad.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype)

        # Their memory is free for the gradients then.
        self.arguments |= dict.fromkeys(_ONLY_FOR_SCANS)
        grads = x.map(buffer)
        arguments = self.arguments | left | {f"d{n}": t for n, t in grads._asdict().items()}
        D = min(self.sizes.gradients_C, self.sizes.C)
        arguments |= {
            "BK": min(self.sizes.gradients_BK, K & -K),
            "BV": min(self.sizes.gradients_BV, triton.next_power_of_2(V)),
            "D": D,
            "LEVELS": D.bit_length() - 1,
        }
        channel = self.arguments["DECAY"] == 2
        gradients = gradients_under_channel_decay if channel else gradients_under_head_decay
        launch(gradients, (self.chunks, P), arguments, self.sizes.gradients_warps)
        pairs = zip(grads, x, strict=True)
        return Operands(*(None if t is None else of_heads(g, t) for g, t in pairs))  # type: ignore[arg-type]
