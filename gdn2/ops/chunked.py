"""The gated delta rule in chunks: matrix products in plain PyTorch, on any device (Eqs. 18-25).

With the rows E, Q and the columns k decayed within a chunk as `decayed_scores` does it,

    X = Z - E S_0        R = (I + T)^-1 X        O = Q S_0 + A_qk R        S_C = D S_0 + k~^T R

and backwards, from dO and dS_C, without forming the gradient of the inverse,

    dR = A_qk^T dO + k~ dS_C      dZ = (I + T)^-T dR      dS_0 = D dS_C + Q^T dO - E^T dZ
    dT = -tril(dZ R^T, -1)        dA_qk = tril(dO R^T)    dE = -dZ S_0^T    dQ = dO S_0^T    ...

E is kept negated, so that E and Q are two kinds of row that every product treats alike.

Kept for the backward: the inputs and one state a segment; the rest is computed again. Sums and
states are float32, or float64 for float64 inputs.

Axes: n chunks of a segment, C tokens a chunk, H key heads, HV value heads, P heads that the
products run over (H, with the values of HV / H heads side by side; HV where a key-side gate has HV
heads), M = n P, Y kinds of row (erase, query), K key channels, V value channels, W = V HV / P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Schedule, Segment, build_schedule
from gdn2.ops.contract import Operands, check_first_order, state_dtype
from gdn2.ops.decayed_scores import ChannelDecay, HeadDecay, NoDecay
from gdn2.ops.triangular import invert_unit_lower

CHUNK = 32
_SEGMENT_ELEMENTS = 2**18  # of one [M, C, K or W] workspace: about a megabyte, to stay in cache


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All sequences in chunks; see the public `gated_delta_rule`."""
    tensors = (*x, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _ChunkedGatedDeltaRule.apply(*tensors, cu_seqlens, scale, keep)


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, erase, write, state, cu_seqlens, scale, keep):
        layout = _Layout.of(q, v, log_decay, erase)
        schedule = layout.schedule(q, cu_seqlens)
        inputs = layout.flat(Operands(q, k, v, log_decay, erase, write))
        out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        S = layout.state_in(state, schedule, q.device)
        starts = []
        for segment in schedule.segments:
            if keep:
                starts.append(S[segment.sequences].clone())
            chunks = _Chunks(segment, layout, inputs, scale, keep=False)
            segment.store(chunks.scan(S[segment.sequences]), layout.values(out))
        if keep:
            ctx.save_for_backward(q, k, v, log_decay, erase, write, *starts)
            ctx.layout, ctx.schedule, ctx.scale = layout, schedule, scale
        return out, layout.state_out(S, schedule)

    @staticmethod
    def backward(ctx, dout, dstate):
        check_first_order()
        operands, starts = Operands(*ctx.saved_tensors[:6]), ctx.saved_tensors[6:]
        layout, schedule = ctx.layout, ctx.schedule
        inputs = layout.flat(operands)
        grads = operands.map(lambda t: t.new_empty(t.shape))
        dinputs = layout.flat(grads)
        dout = layout.values(dout)
        dS = layout.state_in(dstate, schedule, dout.device)
        for segment, S in zip(reversed(schedule.segments), reversed(starts), strict=True):
            chunks = _Chunks(segment, layout, inputs, ctx.scale, keep=True)
            chunks.scan(S.clone())
            chunks.backward(dout, dS[segment.sequences], dinputs)
        dstate = layout.state_out(dS, schedule) if ctx.needs_input_grad[6] else None
        return *grads, dstate, None, None, None


@dataclass(frozen=True)
class _Layout:
    """How heads and channels are arranged for the products: P and W of the module's axes."""

    H: int
    HV: int
    P: int
    K: int
    V: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None) -> "_Layout":
        H, K = q.shape[2:]
        HV, V = v.shape[2:]
        on_value_heads = any(x is not None and x.shape[2] != H for x in (log_decay, erase))
        return cls(H, HV, HV if on_value_heads else H, K, V, state_dtype(q.dtype))

    @property
    def W(self) -> int:
        return self.V * self.HV // self.P

    def schedule(self, q: Tensor, cu_seqlens: Tensor | None) -> Schedule:
        chunks = _SEGMENT_ELEMENTS // (self.P * CHUNK * max(self.K, self.W))
        return build_schedule(
            q.shape[0], q.shape[1], cu_seqlens, chunk=CHUNK, chunks_per_segment=max(1, chunks)
        )

    def flat(self, x: Operands) -> Operands:
        """The same memory as [tokens, heads, channels], gates of a head as one channel.

        Values and their gates lie on P heads: the value heads of a key head side by side.
        """

        def gate(x: Tensor | None) -> Tensor | None:
            return None if x is None else (x.unsqueeze(-1) if x.ndim == 3 else x).flatten(0, 1)

        write = gate(x.write)
        if write is not None:
            write = write.reshape(-1, self.P, self.HV // self.P * write.shape[-1])
        return Operands(
            x.q.flatten(0, 1),
            x.k.flatten(0, 1),
            self.values(x.v),
            gate(x.log_decay),
            gate(x.erase),
            write,
        )

    def values(self, v: Tensor) -> Tensor:
        return v.flatten(0, 1).reshape(-1, self.P, self.W)

    def state_in(self, state: Tensor | None, schedule: Schedule, device: torch.device) -> Tensor:
        """States [N, HV, K, V] as a new [N, P, K, W] in the schedule's order; None is zeros."""
        N, P, G = schedule.num_sequences, self.P, self.HV // self.P
        if state is None:
            return torch.zeros(N, P, self.K, self.W, dtype=self.dtype, device=device)
        grouped = state.view(N, P, G, self.K, self.V).transpose(2, 3)
        return schedule.rank(grouped.reshape(N, P, self.K, self.W))

    def state_out(self, S: Tensor, schedule: Schedule) -> Tensor:
        S = schedule.unrank(S).unflatten(-1, (-1, self.V)).transpose(2, 3)
        return S.reshape(-1, self.HV, self.K, self.V).contiguous()


class _Chunks:
    """One segment's chunks with the gates folded in; `scan` runs over them, `backward` back."""

    def __init__(
        self, segment: Segment, layout: _Layout, inputs: Operands, scale: float, *, keep: bool
    ):
        self.segment, self.layout, self.inputs, self.scale = segment, layout, inputs, scale
        self.keep = keep
        q, k, v, log_decay, erase, write = inputs.map(lambda t: segment.load(t, layout.dtype))
        self.k = k.unsqueeze(2)  # [n, H, 1, C, K]
        _, H, _, C, K = self.k.shape
        kinds = 1 if erase is None else 2
        shared_k = self.k.expand(-1, -1, layout.P // H, -1, -1)
        rows = k.new_empty(*shared_k.shape[:4], kinds, K)
        torch.mul(q.unsqueeze(2).expand_as(shared_k), scale, out=rows[..., -1, :])
        if erase is not None:
            self.erase = self._per_key_head(erase)
            torch.mul(shared_k, self.erase.neg(), out=rows[..., 0, :])  # Eq. 8
        self.rows = rows.view(-1, C, kinds, K)
        k = shared_k.flatten(0, 2)  # [M, C, K], a copy only where heads share k
        self.decay: NoDecay | HeadDecay | ChannelDecay
        if log_decay is None:
            self.decay = NoDecay(self.rows, k)
        else:
            log_decay = self._per_key_head(log_decay)
            log_decay = log_decay.expand(-1, -1, layout.P // H, -1, -1).flatten(0, 2)
            if log_decay.shape[-1] == 1:
                self.decay = HeadDecay(self.rows, k, log_decay)
            else:
                self.decay = ChannelDecay(self.rows, k, log_decay, keep=keep)
        if erase is not None:
            self.inverse = invert_unit_lower(self.decay.scores[:, :, 0])
        self.v = v.flatten(0, 1)  # [M, C, W]
        if write is not None:
            self.write = write.flatten(0, 1).unflatten(-1, (layout.HV // layout.P, -1))
        self.z = self.v if write is None else self._written(self.v)

    def scan(self, S: Tensor) -> Tensor:
        """Run over the segment's chunks; S [sequences, P, K, W] is advanced in place.

        Returns:
            the outputs, [n, P, C, W].
        """
        d, P = self.decay, self.layout.P
        has_erase = self.inputs.erase is not None
        read = self.z.new_empty(*self.rows.shape[:3], self.layout.W)  # rows S_0, [M, C, Y, W]
        R = torch.empty_like(self.z) if has_erase else self.z
        if self.keep:
            self.states = S.new_empty(self.z.shape[0], *S.shape[2:])  # S_0 of each chunk
        for first, count in self.segment.steps:
            now = slice(first * P, (first + count) * P)
            state = S[:count].flatten(0, 1)
            if self.keep:
                self.states[now] = state
            torch.bmm(d.rows[now].flatten(1, 2), state, out=read[now].flatten(1, 2))
            if has_erase:
                torch.bmm(self.inverse[now], self.z[now] + read[now, :, 0], out=R[now])
            if d.total is not None:
                state.mul_(d.total[now].unsqueeze(-1))
            state.baddbmm_(d.tails[now].mT, R[now])
        self.R = R
        out = torch.baddbmm(read[:, :, -1], d.scores[:, :, -1], R)
        return out.view(-1, P, *out.shape[1:])

    def backward(self, dout: Tensor, dS: Tensor, grads: Operands) -> None:
        """After `scan`: from dout [tokens, P, W] and dS, taken back in place, to `grads`."""
        d, P, layout = self.decay, self.layout.P, self.layout
        has_erase = self.inputs.erase is not None
        M, C, kinds, K = self.rows.shape
        # Upstream gradient of what the rows read: dZ (of -E S_0) and dO, as the rows lie.
        dread = self.z.new_empty(M, C, kinds, layout.W)
        dread[:, :, -1] = self.segment.load(dout, layout.dtype).flatten(0, 1)
        dR = d.scores[:, :, -1].mT @ dread[:, :, -1]
        dz = torch.empty_like(dR) if has_erase else dR
        dstates = torch.empty_like(self.states)  # dS_C of each chunk
        for first, count in reversed(self.segment.steps):
            now = slice(first * P, (first + count) * P)
            dstate = dS[:count].flatten(0, 1)
            dstates[now] = dstate
            dR[now].baddbmm_(d.tails[now], dstate)
            if has_erase:
                torch.bmm(self.inverse[now].mT, dR[now], out=dz[now])
                dread[now, :, 0] = dz[now]
            if d.total is not None:
                dstate.mul_(d.total[now].unsqueeze(-1))
            dstate.baddbmm_(d.rows[now].flatten(1, 2).mT, dread[now].flatten(1, 2))
        drows = (dread.flatten(1, 2) @ self.states.mT).view(M, C, kinds, K)
        dscores = (dread.flatten(1, 2) @ self.R.mT).view(M, C, kinds, C)
        dtails = self.R @ dstates.mT
        drows, dk, dlog_decay = d.backward(drows, dtails, dscores, self.states, dstates)
        self._store(drows, dk, dlog_decay, dz, grads)

    def _store(
        self, drows: Tensor, dk: Tensor, dlog_decay: Tensor | None, dz: Tensor, grads: Operands
    ) -> None:
        """Unfold the gates (Eq. 8), and add over what shares an input: groups, or channels."""
        segment, layout = self.segment, self.layout
        n, H, _, C, K = self.k.shape
        drows, dk = drows.view(n, H, -1, C, self.rows.shape[2], K), dk.view(n, H, -1, C, K)
        if grads.erase is not None:
            de = drows[..., 0, :].neg()
            dk = torch.addcmul(dk, de, self.erase)
            self._store_gate(de.mul_(self.k), grads.erase)
        segment.store(drows[..., -1, :].sum(2).mul_(self.scale), grads.q)
        segment.store(dk.sum(2), grads.k)
        if grads.log_decay is not None and dlog_decay is not None:
            self._store_gate(dlog_decay.view(n, H, -1, *dlog_decay.shape[1:]), grads.log_decay)
        dv = dz
        if grads.write is not None:
            dwrite = (dz * self.v).view(*self.write.shape[:3], layout.V)
            if self.write.shape[-1] == 1:
                dwrite = dwrite.sum(-1)
            segment.store(dwrite.view(n, layout.P, C, -1), grads.write)
            dv = self._written(dz)
        segment.store(dv.view(n, layout.P, C, layout.W), grads.v)

    def _store_gate(self, dgate: Tensor, grad: Tensor) -> None:
        """dgate [n, H, G, C, K or 1] to grad [tokens, H or HV, K or 1]."""
        if grad.shape[1] == self.layout.H:
            dgate = dgate.sum(2, keepdim=True)
        if grad.shape[2] == 1:
            dgate = dgate.sum(-1, keepdim=True)
        self.segment.store(dgate.flatten(1, 2), grad)

    def _per_key_head(self, gate: Tensor) -> Tensor:
        """[n, H or HV, C, ...] as [n, H, 1 or G, C, ...]."""
        return gate.unflatten(1, (self.layout.H, -1))

    def _written(self, v: Tensor) -> Tensor:
        """Values [M, C, W] times their gate [M, C, value heads, 1 or V]."""
        return (v.view(*self.write.shape[:3], self.layout.V) * self.write).view_as(v)
