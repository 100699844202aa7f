"""Softmax attention with rotary positions, full or over a sliding window.

Axes: B batch, T time, N sequences, H heads, D channels of a head, S slots of a ring. Time and
memory are O(T x window), or O(T) memory with full attention: no T x T mask is ever built. Packed
sequences are sorted by length into a few rectangles, so nothing is spent on pairs of documents.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.modules.gates import split_heads
from gdn2.modules.linear import OutputLinear
from gdn2.modules.rotary import rotary_angles, rotate
from gdn2.ops.contract import check_boundaries


class AttentionState(NamedTuple):
    """The rotated keys and values that N sequences still need, in one of two layouts.

    Rows, ``[R, H, D]``: the last ``min(length, window)`` tokens of each sequence, end to end; what
    `forward` returns. Rings, ``[N, S, H, D]``: position p of each sequence in slot ``p % S``; what
    `step` works on. S is the window, or (full attention) grows with the longest sequence.

    length: ``[N]`` tokens seen. window: None for full attention.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    window: int | None

    @property
    def num_sequences(self) -> int:
        return self.length.shape[0]

    @property
    def kept(self) -> Tensor:
        """How many tokens of each sequence are remembered, ``[N]``."""
        return self.length if self.window is None else self.length.clamp(max=self.window)

    def gather(self, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `position` of `sequence`; zeros where that is not remembered."""
        if not self.keys.numel():
            zeros = self.keys.new_zeros(*position.shape, *self.keys.shape[-2:])
            return zeros, zeros.clone()
        if self.keys.ndim == 4:
            slots = self.keys.shape[1]
            keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
            row = sequence * slots + position % slots
        else:
            keys, values = self.keys, self.values
            row = (self.kept.cumsum(0) - self.length)[sequence] + position
        missing = (position < (self.length - self.kept)[sequence]) | (
            position >= self.length[sequence]
        )
        row, missing = row.masked_fill(missing, 0), missing[..., None, None]
        return keys[row].masked_fill(missing, 0), values[row].masked_fill(missing, 0)

    def rings(self) -> "AttentionState":
        """The same memory as rings, ready for `step`."""
        if self.keys.ndim == 4:
            return self
        slots = self.window or max(self.length.tolist(), default=0)
        slot = torch.arange(slots, device=self.length.device)
        last = self.length[:, None] - 1
        sequence = torch.arange(len(self.length), device=slot.device)[:, None].expand(-1, slots)
        keys, values = self.gather(sequence, last - (last - slot) % max(slots, 1))
        return AttentionState(keys, values, self.length.clone(), self.window)

    def select(self, index: Tensor) -> "AttentionState":
        """The states of the sequences `index`, copied."""
        keys, values, length, window = self.rings()
        return AttentionState(keys[index], values[index], length[index], window)


class Attention(nn.Module):
    """Multi-head causal attention: ``y = softmax(rot(q) rot(k)^T / sqrt(D)) v W_o``, no biases.

    A token sees itself and the `window - 1` tokens before it in its own sequence (``t - s <
    window``), or all of them if `window` is None. Positions count from the start of the sequence,
    whatever it is packed with, and go on from the state.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int = 128,
        window: int | None = None,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window must be None or at least 1, got {window}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.window, self.rope_theta = window, rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = OutputLinear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, *, state: AttentionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """``x [B, T, D] -> (y [B, T, D], state)``; the given state is left as it is.

        cu_seqlens ``[N + 1]`` packs N sequences into one row; without it N = B.
        """
        B, T, _ = x.shape
        check_boundaries(cu_seqlens, x)
        if cu_seqlens is None:
            lengths = torch.full((B,), T, device=x.device)
            longest = T if B else 0
        else:
            lengths = cu_seqlens.diff().long()
            longest = max(lengths.tolist(), default=0)
        everyone = torch.arange(len(lengths), device=x.device)
        if state is not None and not longest:
            return torch.zeros_like(x), state.select(everyone)

        starts = lengths.cumsum(0) - lengths
        seen = torch.zeros_like(lengths) if state is None else state.length
        sequence = torch.repeat_interleave(lengths, output_size=B * T)
        position = torch.arange(B * T, device=x.device) + (seen - starts)[sequence]
        q, k, v = self._project(x.flatten(0, 1), position)  # [B * T, H, D]
        if cu_seqlens is None:
            q_n, k_n, v_n = (y.unflatten(0, (B, T)) for y in (q, k, v))
            out = self._attend(q_n, k_n, v_n, state, everyone).flatten(0, 1)
        else:
            out = self._attend_packed(q, k, v, state, lengths)
        y = self.o_proj(out.flatten(-2)).unflatten(0, (B, T))
        if state is None and (self.window is None or longest <= self.window):
            return y, AttentionState(k, v, lengths, self.window)
        return y, self._remember(k, v, state, starts, seen + lengths)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One token, ``x [B, D] -> (y [B, D], state)``; rings of a window are updated in place."""
        state = state.rings()
        keys, values, length, window = state
        q, k, v = self._project(x, length)  # [B, H, D]
        if window is None:
            keys, values = (F.pad(y, (0, 0, 0, 0, 0, 1)) for y in (keys, values))
            length = length.clone()
        slots = keys.shape[1]
        here = torch.arange(len(length), device=x.device), length % slots
        keys[here], values[here] = k.to(keys.dtype), v.to(values.dtype)
        length += 1
        filled = torch.arange(slots, device=x.device) < length[:, None]
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2),  # [B, H, 1, D]
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            attn_mask=filled[:, None, None],
        )
        return self.o_proj(out.flatten(1)), AttentionState(keys, values, length, window)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, ``[R, H, D]``, of rows ``x [R, D]``."""
        q, k, v = (
            split_heads(linear(x), self.num_heads)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = rotary_angles(position, self.head_dim, self.rope_theta, q.dtype)
        q, k = rotate((q, k), angles)
        return q, k, v

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, lengths: Tensor
    ) -> Tensor:
        """Attention of sequences that lie end to end, ``[T, H, D]``, a rectangle at a time."""
        starts, rows, count = lengths.cumsum(0) - lengths, [q[:0]], 0
        order = torch.empty(len(q), dtype=torch.long, device=q.device)
        for chosen, row, is_token in _rectangles(lengths):
            order[(starts[chosen, None] + row)[is_token]] = (
                count + is_token.flatten().nonzero()[:, 0]
            )
            q_n, k_n, v_n = (_take(y, starts[chosen, None] + row) for y in (q, k, v))
            rows.append(self._attend(q_n, k_n, v_n, state, chosen).flatten(0, 1))
            count += row.numel()
        return _take(torch.cat(rows), order)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, chosen: Tensor
    ) -> Tensor:
        """Attention of ``[n, T, H, D]``, the sequences `chosen`, behind what `state` holds."""
        first = None
        if state is not None:
            kept = state.kept[chosen]
            past = int(kept.max())
            slot = torch.arange(past, device=q.device)
            position = state.length[chosen, None] - past + slot
            keys, values = state.gather(chosen[:, None].expand_as(position), position)
            k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)
            first = past - kept
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return causal_attention(q, k, v, window=self.window, first=first).transpose(1, 2)

    def _remember(
        self,
        k: Tensor,
        v: Tensor,
        state: AttentionState | None,
        starts: Tensor,
        length: Tensor,
    ) -> AttentionState:
        """The rows that are still needed after these keys and values, ``[B * T, H, D]``."""
        kept = AttentionState(k, v, length, self.window).kept
        seen = torch.zeros_like(length) if state is None else state.length
        sequence = torch.repeat_interleave(kept)
        position = (
            torch.arange(len(sequence), device=k.device) + (length - kept.cumsum(0))[sequence]
        )
        row = position + (starts - seen)[sequence]
        if state is None:
            return AttentionState(k[row], v[row], length, self.window)
        old = (position < seen[sequence])[:, None, None]
        keys, values = state.gather(sequence, position)
        row = row.clamp(0, len(k) - 1)
        keys = torch.where(old, keys.to(k.dtype), k[row])
        return AttentionState(
            keys, torch.where(old, values.to(v.dtype), v[row]), length, self.window
        )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, first: Tensor | None = None
) -> Tensor:
    """Attention of T queries at the end of P + T keys, in blocks of queries.

    Args:
        q: ``[N, H, T, D]``. k, v: ``[N, H, P + T, D]``. Query t stands at key ``P + t``.
        window: query t sees the keys s with ``0 <= P + t - s < window``; None: ``0 <= P + t - s``.
        first: ``[N]``, the first key of each sequence that exists. None: 0.
    """
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    if past == 0 and (window is None or window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # A block of queries sees its own keys and `reach` blocks before: at most 5/4 windows (or 256).
    block = 512 if window is None else max(128, window // 4)
    first = torch.zeros(1, dtype=torch.long, device=q.device) if first is None else first
    if window is not None:
        reach = -(-(window - 1) // block)
        missing = reach * block - past
        k, v = (F.pad(y, (0, 0, missing, 0)) for y in (k, v))  # negative padding crops
        past, first = reach * block, first + missing
        # split, unlike slices, has a backward that is linear in the number of blocks
        k_blocks, v_blocks = k.split(block, dim=2), v.split(block, dim=2)
    out = []
    for i, queries in enumerate(q.split(block, dim=2)):
        begin, t = 0, past + i * block + torch.arange(queries.shape[2], device=q.device)[:, None]
        if window is None:
            end = past + i * block + queries.shape[2]
            keys, values = k[:, :, :end], v[:, :, :end]
        else:
            begin = i * block
            keys = torch.cat(k_blocks[i : i + reach + 1], dim=2)
            values = torch.cat(v_blocks[i : i + reach + 1], dim=2)
        s = begin + torch.arange(keys.shape[2], device=q.device)
        seen = (s <= t) & (s >= first[:, None, None])  # [N, block, keys]
        if window is not None:
            seen &= t - s < window
        out.append(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen.unsqueeze(1))
        )
    return torch.cat(out, dim=2)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` with a backward that adds up rows (index_add), not single numbers."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _rectangles(lengths: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Group sequences whose lengths share a power of two, as (sequences, columns, is a token).

    Sequences ``[n]``, columns and mask ``[n, L]`` with L the longest of the group: at most twice
    the tokens, in at most log2(T) groups however many sequences there are. Columns past the end
    of a sequence repeat its last token; causality keeps them from being seen.
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths.tolist()):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(i)
    rectangles = []
    for members in groups.values():
        chosen = torch.tensor(members, device=lengths.device)
        length = lengths[chosen, None]
        column = torch.arange(int(length.max()), device=lengths.device)
        rectangles.append((chosen, torch.minimum(column, length - 1), column < length))
    return rectangles
