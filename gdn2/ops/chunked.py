"""The gated delta rule in chunks: matrix products in plain PyTorch, on any device (Eqs. 18-25).

With the rows E, Q and the columns k decayed within a chunk as `decayed_scores` does it,

    X = Z - E S_0        R = (I + T)^-1 X        O = Q S_0 + A_qk R        S_C = D S_0 + k~^T R

and backwards, from dO and dS_C, without forming the gradient of the inverse,

    dR = A_qk^T dO + k~ dS_C      dZ = (I + T)^-T dR      dS_0 = D dS_C + Q^T dO - E^T dZ
    dT = -tril(dZ R^T, -1)        dA_qk = tril(dO R^T)    dE = -dZ S_0^T    dQ = dO S_0^T    ...

E and Q are two kinds of row that lie alternately, so that one product serves both.

Kept for the backward: the inputs and one state a segment; the rest is computed again. Sums and
states are float32, or float64 for float64 inputs.

Axes: n chunks of a segment, C tokens a chunk, H key heads, HV value heads, P heads that the
products run over (H, with the values of HV / H heads side by side; HV where a key-side gate has HV
heads), M = n P, Y kinds of row (erase, query), K key channels, V value channels, W = V HV / P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Schedule, Segment, Workspace, build_schedule
from gdn2.ops.contract import Operands, check_first_order, no_autocast, state_dtype
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
        empty = Workspace(layout.dtype, q.device)
        starts = []
        for segment in schedule.segments:
            if keep:
                starts.append(S[segment.sequences].clone())
            chunks = _Chunks(segment, layout, inputs, scale, empty, keep=False)
            segment.store(chunks.scan(S[segment.sequences]), layout.values(out))
        if keep:
            ctx.save_for_backward(q, k, v, log_decay, erase, write, *starts)
            ctx.layout, ctx.schedule, ctx.scale = layout, schedule, scale
        return out, layout.state_out(S, schedule)

    @staticmethod
    def backward(ctx, dout, dstate):
        check_first_order()
        saved = ctx.saved_tensors  # once: a checkpoint computes them again at each access
        operands, starts = Operands(*saved[:6]), saved[6:]
        layout, schedule = ctx.layout, ctx.schedule
        inputs = layout.flat(operands)
        grads = operands.map(lambda t: t.new_empty(t.shape))
        dinputs = layout.flat(grads)
        dout = layout.values(dout)
        dS = layout.state_in(dstate, schedule, dout.device)
        empty = Workspace(layout.dtype, dout.device)
        with no_autocast(dout):
            for segment, S in zip(reversed(schedule.segments), reversed(starts), strict=True):
                chunks = _Chunks(segment, layout, inputs, ctx.scale, empty, keep=True)
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
        B, T = q.shape[:2]
        bounds = [b * T for b in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        chunks = _SEGMENT_ELEMENTS // (self.P * CHUNK * max(self.K, self.W))
        return build_schedule(
            bounds, chunk=CHUNK, chunks_per_segment=max(1, chunks), device=q.device
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
        self,
        segment: Segment,
        layout: _Layout,
        inputs: Operands,
        scale: float,
        empty: Workspace,
        *,
        keep: bool,
    ):
        self.segment, self.layout, self.inputs = segment, layout, inputs
        self.scale, self.empty, self.keep = scale, empty, keep
        # [n, H, G, C, ...]: the heads of the products by key head
        self.heads = (segment.num_chunks, layout.H, layout.P // layout.H, segment.chunk)
        k = self._load_shared(inputs.k, empty("k", *self.heads, layout.K))
        rows = empty("rows", *self.heads, 1 if inputs.erase is None else 2, layout.K)
        self._load_shared(inputs.q, rows[..., -1, :])
        if inputs.erase is not None:
            self.erase = self._load("erase", inputs.erase).unflatten(1, (layout.H, -1))
            torch.mul(k, self.erase, out=rows[..., 0, :])  # Eq. 8
        self.decay = self._build_decay(rows.flatten(0, 2), k.flatten(0, 2))
        if inputs.erase is not None:
            self.inverse = invert_unit_lower(self.decay.scores[:, :, 0])
        self.v = self._load("v", inputs.v).flatten(0, 1)  # [M, C, W]
        self.z = self.v
        if inputs.write is not None:
            write = self._load("write", inputs.write).flatten(0, 1)
            self.write = write.unflatten(-1, (layout.HV // layout.P, -1))
            self.z = self._written(self.v)

    def _build_decay(self, rows: Tensor, k: Tensor) -> NoDecay | HeadDecay | ChannelDecay:
        x = self.inputs.log_decay
        if x is None:
            return NoDecay(rows, k, self.empty)
        log_decay = self._load_shared(x, self.empty("decay", *self.heads, x.shape[2]))
        kind = HeadDecay if x.shape[2] == 1 else ChannelDecay
        return kind(rows, k, log_decay.flatten(0, 2), self.empty, keep=self.keep)

    def scan(self, S: Tensor) -> Tensor:
        """Run over the segment's chunks; S [sequences, P, K, W] is advanced in place.

        Returns:
            the outputs, [n, P, C, W].
        """
        d, P, empty = self.decay, self.layout.P, self.empty
        has_erase = self.inputs.erase is not None
        M, C, W = self.z.shape
        read = empty("read", *d.rows.shape[:3], W)  # rows S_0, [M, C, Y, W]
        self.R = empty("R", M, C, W) if has_erase else self.z
        if self.keep:
            self.states = empty("states", M, W, S.shape[2])  # S_0^T of each chunk
        for first, count in self.segment.steps:
            now = slice(first * P, (first + count) * P)
            state = S[:count].flatten(0, 1)
            if self.keep:
                self.states[now] = state.mT
            torch.bmm(d.rows[now].flatten(1, 2), state, out=read[now].flatten(1, 2))
            if has_erase:
                X = torch.sub(self.z[now], read[now, :, 0], out=empty("X", count * P, C, W))
                torch.bmm(self.inverse[now], X, out=self.R[now])
            if d.total is not None:
                state.mul_(d.total[now].unsqueeze(-1))
            state.baddbmm_(d.tails[now].mT, self.R[now])
        out = torch.bmm(d.scores[:, :, -1], self.R, out=empty("out", M, C, W))
        return out.add_(read[:, :, -1]).mul_(self.scale).view(-1, P, C, W)

    def backward(self, dout: Tensor, dS: Tensor, grads: Operands) -> None:
        """After `scan`: from dout [tokens, P, W] and dS, taken back in place, to `grads`."""
        d, P, empty = self.decay, self.layout.P, self.empty
        has_erase = self.inputs.erase is not None
        M, C, kinds, K = d.rows.shape
        W = self.layout.W
        dO = self._load("out", dout).flatten(0, 1).mul_(self.scale)
        # Gradient of what the rows read of the state, as the rows lie: -dZ and dO.
        dread = empty("dread", M, C, kinds, W)
        dread[:, :, -1] = dO
        dR = torch.bmm(d.scores[:, :, -1].mT, dO, out=empty("dR", M, C, W))
        dz = empty("dz", M, C, W) if has_erase else dR
        dstates = empty("dstates", *self.states.shape)  # dS_C^T of each chunk
        for first, count in reversed(self.segment.steps):
            now = slice(first * P, (first + count) * P)
            dstate = dS[:count].flatten(0, 1)
            dstates[now] = dstate.mT
            dR[now].baddbmm_(d.tails[now], dstate)
            if has_erase:
                torch.bmm(self.inverse[now].mT, dR[now], out=dz[now])
                torch.neg(dz[now], out=dread[now, :, 0])
            if d.total is not None:
                dstate.mul_(d.total[now].unsqueeze(-1))
            dstate.baddbmm_(d.rows[now].flatten(1, 2).mT, dread[now].flatten(1, 2))
        flat = dread.flatten(1, 2)
        drows = torch.bmm(flat, self.states, out=empty("drows", M, C * kinds, K))
        dscores = torch.bmm(flat, self.R.mT, out=empty("dscores", M, C * kinds, C))
        dtails = torch.bmm(self.R, dstates, out=empty("dtails", M, C, K))
        drows, dk, dlog_decay = d.backward(
            drows.view(M, C, kinds, K),
            dtails,
            dscores.view(M, C, kinds, C),
            self.states,
            dstates,
        )
        self._store_key_side(drows, dk, dlog_decay, grads)
        self._store_value_side(dz, grads)

    def _store_key_side(
        self, drows: Tensor, dk: Tensor, dlog_decay: Tensor | None, grads: Operands
    ) -> None:
        """Unfold the erase gate (Eq. 8); add over heads and channels that share an input."""
        drows, dk = drows.view(*self.heads, *drows.shape[2:]), dk.view(*self.heads, -1)
        if grads.erase is not None:
            de = drows[..., 0, :]
            dk.addcmul_(de, self.erase)
            self._store_shared(de.mul_(self.decay.raw_k.view_as(dk)), grads.erase)
        self._store_shared(drows[..., -1, :], grads.q)
        self._store_shared(dk, grads.k)
        if grads.log_decay is not None and dlog_decay is not None:
            self._store_shared(dlog_decay.view(*self.heads, -1), grads.log_decay)

    def _store_value_side(self, dz: Tensor, grads: Operands) -> None:
        n, P, C = self.segment.num_chunks, self.layout.P, self.segment.chunk
        dv = dz
        if grads.write is not None:
            dv = self._written(dz)
            dwrite = dz.mul_(self.v).view(*self.write.shape[:3], self.layout.V)
            if self.write.shape[-1] == 1:
                dwrite = dwrite.sum(-1)
            self.segment.store(dwrite.view(n, P, C, -1), grads.write)
        self.segment.store(dv.view(n, P, C, -1), grads.v)

    def _load(self, name: str, x: Tensor) -> Tensor:
        """[tokens, heads, channels] as chunks [n, heads, C, channels]."""
        shape = (self.segment.num_chunks, x.shape[1], self.segment.chunk, x.shape[2])
        return self.segment.load(x, self.empty(name, *shape))

    def _load_shared(self, x: Tensor, chunks: Tensor) -> Tensor:
        """[tokens, H or P, D] into [n, H, G, C, D], the same for all that share a head."""
        if x.shape[1] == self.layout.P:
            self.segment.load(x, chunks.flatten(1, 2))
            return chunks
        return chunks.copy_(self._load("shared", x).unsqueeze(2))

    def _store_shared(self, grad: Tensor, total: Tensor) -> None:
        """[n, H, G, C, K or 1] to [tokens, H or HV, K or 1]."""
        if total.shape[1] == self.layout.H:
            grad = grad.sum(2, keepdim=True) if grad.shape[2] > 1 else grad
        if total.shape[2] < grad.shape[-1]:
            grad = grad.sum(-1, keepdim=True)
        self.segment.store(grad.flatten(1, 2), total)

    def _written(self, v: Tensor) -> Tensor:
        """Values [M, C, W] times their gate [M, C, value heads, 1 or V]."""
        by_head = v.view(*self.write.shape[:3], self.layout.V)
        z = self.empty("z", *v.shape)
        torch.mul(by_head, self.write, out=z.view(by_head.shape))
        return z
