"""One segment's chunks: gates folded in, the scan over them, and the way back (Eqs. 18-24, B1-B7).

Axes: n chunks of a segment, C tokens a chunk, H key heads, HV value heads, P heads that the
products run over (H, with the values of HV / H heads side by side; HV where a key-side gate has HV
heads), G = P / H, M = n P, Y kinds of row (erase, query), K key channels, V value channels,
W = V HV / P. Buffers that enter products have M first, those of the key side the tokens (see
`decayed_scores`, which also chooses the order of tokens there and along the rows of products).
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Schedule, Segment, Shape, TokenOrder, Workspace
from gdn2.ops.contract import Operands, in_parts, state_dtype
from gdn2.ops.decayed_scores import ChannelDecay, HeadDecay, NoDecay, smallest_factor


@dataclass(frozen=True)
class Layout:
    """Which gates there are, and how heads and channels are arranged for the products."""

    H: int
    HV: int
    P: int
    K: int
    V: int
    decay: type[NoDecay | HeadDecay | ChannelDecay]
    has_erase: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None) -> "Layout":
        H, K = q.shape[2:]
        HV, V = v.shape[2:]
        on_value_heads = any(x is not None and x.shape[2] != H for x in (log_decay, erase))
        P = HV if on_value_heads else H
        return cls(H, HV, P, K, V, _decay_class(log_decay), erase is not None, state_dtype(q.dtype))

    @property
    def W(self) -> int:
        return self.V * self.HV // self.P

    def flat(self, x: Operands) -> Operands:
        """The same memory as [tokens, heads, heads that share, channels], absent axes of size 1.

        Key side [tokens, H, G or 1, K or 1], value side [tokens, P, HV / P, V or 1].
        """

        def gate(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unsqueeze(-1) if x.ndim == 3 else x

        def key_side(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1).unflatten(1, (self.H, -1))

        write = gate(x.write)
        return Operands(
            x.q.flatten(0, 1).unsqueeze(2),
            x.k.flatten(0, 1).unsqueeze(2),
            self.values(x.v),
            key_side(gate(x.log_decay)),
            key_side(gate(x.erase)),
            None if write is None else self.values(write),
        )

    def values(self, v: Tensor) -> Tensor:
        return v.flatten(0, 1).unflatten(1, (self.P, -1))

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


class _Step(NamedTuple):
    """What the scan reads and writes, [M, ...]; of a step, its part of M."""

    rows: Tensor
    tails_mT: Tensor
    total: Tensor | None
    inverse: Tensor | None
    z: Tensor
    start: Tensor | None
    read: Tensor
    read_by_erase: Tensor
    R: Tensor


class _StepBack(NamedTuple):
    """What the way back reads and writes, likewise."""

    start: Tensor
    start_mT: Tensor
    rows_mT: Tensor
    tails: Tensor
    total: Tensor | None
    inverse_mT: Tensor | None
    R: Tensor
    dG_end: Tensor
    dtails: Tensor
    dR: Tensor
    dz: Tensor
    dread: Tensor
    dread_by_erase: Tensor
    drows: Tensor


class Chunks:
    """The chunks of segments of one shape, with their buffers and views.

    `load` folds the gates in, `scan` runs over the chunks; then follow `store`, or `backward`.
    """

    def __init__(
        self,
        shape: Shape,
        layout: Layout,
        scale: float,
        empty: Workspace,
        *,
        keep: bool,
    ):
        self.layout, self.scale, self.empty, self.grid = layout, scale, empty, shape.grid
        C, P, K, W = shape.chunk, layout.P, layout.K, layout.W
        M, Y = shape.num_chunks * P, 2 if layout.has_erase else 1
        self.decay = d = layout.decay(Y, C, M, K, empty, keep=keep)
        self.order = TokenOrder(C, bits_reversed=layout.decay.bits_reversed)
        z = empty("z", C, M, W)
        self.R = empty("R", M, C, W) if layout.has_erase else z.transpose(0, 1)
        self.read = empty("read", M, Y * C, W)  # what the rows read of the state
        self.out = empty("out", M, C, W)
        # What is lower becomes zero; exp() itself is slow where its result is denormal.
        self.lowest = math.log(smallest_factor(empty.dtype)) - 1.0
        # Buffers as tokens lie in the inputs:
        self.k, self.q = self._key_side(d.raw_k), self._key_side(d.raw_rows[-1])
        self.e = self._key_side(d.raw_rows[0])  # only where there is an erase gate
        self.log_decay = self._key_side(d.log_decay)
        self.z = self._value_side(z)
        self.inside = self._value_side(self.out.transpose(0, 1))
        self.before = self._value_side(self.read[:, -C:].transpose(0, 1))
        if keep:
            self.starts = empty("starts", M, K, W)
            self.dread = empty("dread", M, Y * C, W)
            self.drows = empty("drows by chunk", M, Y * C, K)
            self.dR = empty("dR", M, C, W)
            self.dz = empty("dz", M, C, W) if layout.has_erase else self.dR
            self.dtails = empty("dtails", M, C, K)
            self.dG_end = empty("decay gradient at the end", M, K)
            times = self.order.times(C).to(empty.device)
            self.from_now_on = (times >= times.unsqueeze(1)).to(empty.dtype)
        sizes = [count * P for count in shape.steps]

        def split(x: Tensor) -> tuple[Tensor, ...]:
            return x.split(sizes)

        self.X = empty("X", max(sizes), C, W)
        inverse = None if d.block_inverse is None else d.block_inverse.inverse
        rows, total = d.rows.flatten(0, 1), None if d.total is None else d.total.unsqueeze(-1)
        forth = _Step(
            rows=rows.transpose(0, 1),
            tails_mT=d.tails.permute(1, 2, 0),
            total=total,
            inverse=inverse,
            z=z.transpose(0, 1),
            start=self.starts if keep else None,
            read=self.read,
            read_by_erase=self.read[:, :C],
            R=self.R,
        )
        self.steps = [_Step(*views) for views in in_parts(forth, split)]
        if keep:
            self.product = empty("product", max(sizes), K, W)
            back = _StepBack(
                start=self.starts,
                start_mT=self.starts.mT,
                rows_mT=rows.permute(1, 2, 0),
                tails=d.tails.transpose(0, 1),
                total=total,
                inverse_mT=None if inverse is None else inverse.mT,
                R=self.R,
                dG_end=self.dG_end,
                dtails=self.dtails,
                dR=self.dR,
                dz=self.dz,
                dread=self.dread,
                dread_by_erase=self.dread[:, :C],
                drows=self.drows,
            )
            self.steps_back = [_StepBack(*views) for views in in_parts(back, split)][::-1]

    def load(self, segment: Segment, inputs: Operands) -> None:
        """Fold the gates of the segment's tokens into scores, rows, tails and written values."""
        self.k.copy_(segment.read(inputs.k, self.order))
        torch.mul(self._read(segment, inputs.q).expand_as(self.q), self.scale, out=self.q)
        if inputs.erase is not None:
            torch.mul(self.k, self._read(segment, inputs.erase), out=self.e)  # Eq. 8
        if inputs.log_decay is not None:
            log_decay = self._read(segment, inputs.log_decay).expand_as(self.log_decay)
            torch.clamp(log_decay, min=self.lowest, out=self.log_decay)
        self.decay.forward()
        if inputs.write is None:
            self.z.copy_(segment.read(inputs.v, self.order))
        else:
            v, write = self._read(segment, inputs.v), self._read(segment, inputs.write)
            torch.mul(v, write, out=self.z)

    def scan(self, S: Tensor) -> None:
        """Run over the segment's chunks; S [sequences, P, K, W] is advanced in place."""
        states = S.flatten(0, 1)
        for step in self.steps:
            state = states[: len(step.R)]
            if step.start is not None:
                step.start.copy_(state)
            torch.bmm(step.rows, state, out=step.read)
            if step.inverse is not None:
                X = torch.sub(step.z, step.read_by_erase, out=self.X[: len(state)])
                torch.bmm(step.inverse, X, out=step.R)
            if step.total is not None:
                state.mul_(step.total)
            state.baddbmm_(step.tails_mT, step.R)

    def store(self, segment: Segment, out: Tensor) -> None:
        """After `scan`: the outputs, to out [tokens, P, HV / P, V]."""
        torch.bmm(self.decay.query_scores, self.R, out=self.out)
        segment.write(out, self.order, lambda to: torch.add(self.inside, self.before, out=to))

    def backward(
        self,
        segment: Segment,
        inputs: Operands,
        dout: Tensor,
        dS: Tensor,
        grads: Operands,
    ) -> None:
        """After `scan`: from dout [tokens, P, HV / P, V] and dS to `grads`.

        dS comes as that after the segment's last token, and is taken back in place.
        """
        d, C = self.decay, segment.shape.chunk
        # Gradient of what the rows read of the state, as the rows lie: -dZ and dO.
        dO = self.dread[:, -C:]
        self._value_side(dO.transpose(0, 1)).copy_(segment.read(dout, self.order))
        torch.bmm(d.query_scores.mT, dO, out=self.dR)
        dstates = dS.flatten(0, 1)
        for step in self.steps_back:
            dstate = dstates[: len(step.R)]
            product = torch.mul(dstate, step.start, out=self.product[: len(dstate)])
            torch.sum(product, -1, out=step.dG_end)
            torch.bmm(step.R, dstate.mT, out=step.dtails)
            step.dR.baddbmm_(step.tails, dstate)
            if step.inverse_mT is not None:
                torch.bmm(step.inverse_mT, step.dR, out=step.dz)
                torch.neg(step.dz, out=step.dread_by_erase)
            torch.bmm(step.dread, step.start_mT, out=step.drows)
            if step.total is not None:
                dstate.mul_(step.total)
            dstate.baddbmm_(step.rows_mT, step.dread)
        M, _, W = self.dread.shape
        columns = self.empty("columns", M, W, C).copy_(self.R.mT)
        torch.bmm(self.dread, columns, out=d.dscores)
        d.drows.flatten(0, 1).copy_(self.drows.transpose(0, 1))
        d.dk.copy_(self.dtails.transpose(0, 1))
        if d.total is not None:  # Eq. B7
            product = torch.mul(d.tails, d.dk, out=self.empty("product", *d.dk.shape))
            self.dG_end.mul_(d.total).add_(product.sum(0))
        dG = d.backward()
        if dG is not None and grads.log_decay is not None:
            self._write(segment, self._key_side(self._sum_over_later(dG)), grads.log_decay)
        self._store_key_side(segment, inputs, grads)
        self._store_value_side(segment, inputs, grads)

    def _sum_over_later(self, dG: Tensor) -> Tensor:
        """Sum dG [C, M, K or 1] over the chunk's later tokens and its end."""
        total = self.empty("decay gradient", *dG.shape)
        torch.mm(self.from_now_on, dG.flatten(1), out=total.flatten(1))
        end = self.dG_end
        return total.add_(end if dG.shape[-1] == end.shape[-1] else end.sum(-1, keepdim=True))

    def _store_key_side(self, segment: Segment, inputs: Operands, grads: Operands) -> None:
        d = self.decay
        if inputs.erase is not None and grads.erase is not None:  # unfold the gate (Eq. 8)
            de, dk = self._key_side(d.drows[0]), self._key_side(d.dk)
            dk.addcmul_(de, self._read(segment, inputs.erase))
            self._write(segment, de.mul_(self.k), grads.erase)
        self._write(segment, self._key_side(d.drows[-1]).mul_(self.scale), grads.q)
        self._write(segment, self._key_side(d.dk), grads.k)

    def _store_value_side(self, segment: Segment, inputs: Operands, grads: Operands) -> None:
        dv = dz = self._value_side(self.dz.transpose(0, 1))
        if inputs.write is not None and grads.write is not None:
            v, write = self._read(segment, inputs.v), self._read(segment, inputs.write)
            self._write(segment, torch.mul(dz, v, out=self.z), grads.write)
            dv = dz.mul_(write)
        self._write(segment, dv, grads.v)

    def _read(self, segment: Segment, x: Tensor) -> Tensor:
        """x [tokens, ...] as [*order, *grid, ...], in the workspace's dtype."""
        return segment.read(x, self.order).to(self.empty.dtype)

    def _write(self, segment: Segment, x: Tensor, to: Tensor) -> None:
        """x [*order, *grid, ...] to [tokens, ...], summed over those last axes that `to` lacks."""
        for dim in (-2, -1):
            if to.shape[dim] < x.shape[dim]:
                x = x.sum(dim, keepdim=True)
        segment.write(to, self.order, lambda part: part.copy_(x))

    def _key_side(self, x: Tensor) -> Tensor:
        """View a buffer [C, M, D] as [*order, *grid, H, G, D]."""
        return self._as_tokens(x, self.layout.H, self.layout.P // self.layout.H)

    def _value_side(self, x: Tensor) -> Tensor:
        """View a buffer [C, M, W] as [*order, *grid, P, HV / P, V]."""
        return self._as_tokens(x, self.layout.P).unflatten(-1, (-1, self.layout.V))

    def _as_tokens(self, x: Tensor, *heads: int) -> Tensor:
        return x.unflatten(1, (*self.grid, *heads)).unflatten(0, self.order.sizes)


class KeptChunks(threading.local):
    """`Chunks` with their buffers, kept for later segments and calls, by each thread its own.

    To make them anew takes as long as to compute on some fifty tokens.
    """

    def __init__(self) -> None:
        self._workspace = cache(Workspace)
        self._chunks = lru_cache(maxsize=64)(Chunks)

    def __call__(
        self, schedule: Schedule, layout: Layout, scale: float, device: torch.device, *, keep: bool
    ) -> Callable[[Segment], Chunks]:
        """Return a function that finds the `Chunks` for a segment."""
        empty = self._workspace(layout.dtype, device)

        def find(segment: Segment) -> Chunks:
            return self._chunks(segment.shape, layout, scale, empty, keep=keep)

        if schedule.segments:  # the largest first: its buffers then serve all others
            find(max(schedule.segments, key=lambda segment: segment.shape.num_chunks))
        return find


def _decay_class(log_decay: Tensor | None) -> type[NoDecay | HeadDecay | ChannelDecay]:
    if log_decay is None:
        return NoDecay
    return HeadDecay if log_decay.ndim == 3 else ChannelDecay
