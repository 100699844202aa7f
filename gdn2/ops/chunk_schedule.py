"""Which tokens form which chunk, and in which order chunks are worked on.

Every sequence is cut into chunks from its own start. Chunks that can be worked on together form a
segment: consecutive steps of the scan over a group of sequences, small enough that its workspaces
stay in cache. Equal sequences (a batch) and packed ones of any length are the same thing here.

Axes: n chunks of a segment, C tokens a chunk, H heads, D channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Chunks in step-major order: all sequences' first chunks of the segment, then the second ...

    Attributes:
        sequences: ranks of the sequences that the segment's first step works on.
        steps: ``(first chunk, number of chunks)`` of each step of the scan; a step's chunks belong
            to the first of `sequences`, one each.
        chunk: tokens a chunk.
        tokens: positions of the segment's tokens in the flat token axis.
        places: where these tokens go in the ``n * C`` rows of the chunks; None: everywhere, in
            order. Rows without a token are padding: zeros on load, dropped on store.
    """

    sequences: slice
    steps: list[tuple[int, int]]
    chunk: int
    tokens: Tensor | slice
    places: Tensor | slice | None

    @property
    def num_chunks(self) -> int:
        return sum(count for _, count in self.steps)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy ``[tokens, H, D]`` into chunks ``[n, H, C, D]`` of `dtype`."""
        rows = x[self.tokens]
        if self.places is not None:
            padded = rows.new_zeros(self.num_chunks * self.chunk, *x.shape[1:])
            padded[self.places] = rows
            rows = padded
        chunks = rows.unflatten(0, (-1, self.chunk)).transpose(1, 2)
        return torch.empty(chunks.shape, dtype=dtype, device=x.device).copy_(chunks)

    def store(self, chunks: Tensor, x: Tensor) -> None:
        """Copy chunks ``[n, H, C, D]`` back to their tokens of x ``[tokens, H, D]``."""
        if self.places is None and isinstance(self.tokens, slice):
            x[self.tokens].unflatten(0, (-1, self.chunk)).copy_(chunks.transpose(1, 2))
            return
        rows = chunks.transpose(1, 2).flatten(0, 1)
        x[self.tokens] = (rows if self.places is None else rows[self.places]).to(x.dtype)


@dataclass(frozen=True)
class Schedule:
    """All segments in the order of the scan.

    Attributes:
        segments: for a group of sequences from their first to their last chunks, group by group.
        order: the sequence at each rank (steps count sequences by rank, longest first); None when
            that is the given order.
    """

    segments: list[Segment]
    num_sequences: int
    order: Tensor | None

    def rank(self, state: Tensor) -> Tensor:
        """Copy states ``[N, ...]`` from the caller's order to the order of ranks."""
        return state.clone() if self.order is None else state[self.order]

    def unrank(self, state: Tensor) -> Tensor:
        """Undo `rank`."""
        if self.order is None:
            return state
        given = torch.empty_like(state)
        given[self.order] = state
        return given


def build_schedule(
    batch: int, time: int, cu_seqlens: Tensor | None, *, chunk: int, chunks_per_segment: int
) -> Schedule:
    """Cut ``[batch, time]`` tokens, or one packed row, into chunks and segments."""
    if cu_seqlens is None:
        starts, lengths = [b * time for b in range(batch)], [time] * batch
        device, order = None, list(range(batch))
    else:
        bounds = cu_seqlens.tolist()
        starts = bounds[:-1]
        lengths = [stop - start for start, stop in pairwise(bounds)]
        order = sorted(range(len(starts)), key=lambda n: -lengths[n])
        device = cu_seqlens.device
    sequences = [(starts[n], lengths[n]) for n in order]
    segments: list[Segment] = []
    for first in range(0, len(sequences), chunks_per_segment):
        group = sequences[first : first + chunks_per_segment]
        segments += _cut_group(group, first, chunk, chunks_per_segment, device)
    in_order = order == list(range(len(order)))
    ranks = None if in_order else torch.tensor(order, device=device)
    return Schedule(segments, len(sequences), ranks)


def _cut_group(
    group: list[tuple[int, int]],
    first_rank: int,
    chunk: int,
    chunks_per_segment: int,
    device: torch.device | None,
) -> Iterator[Segment]:
    """Segments of a group of (start, length) that is sorted by falling length."""
    runs: list[list[tuple[int, int]]] = []  # (first token, tokens) of every chunk of every step
    for offset in range(0, group[0][1], chunk):
        active = [(start, length) for start, length in group if length > offset]
        if runs and sum(map(len, runs)) + len(active) > chunks_per_segment:
            yield _build_segment(runs, first_rank, chunk, device)
            runs = []
        runs.append([(start + offset, min(chunk, length - offset)) for start, length in active])
    if runs:
        yield _build_segment(runs, first_rank, chunk, device)


def _build_segment(
    steps: list[list[tuple[int, int]]], first_rank: int, chunk: int, device: torch.device | None
) -> Segment:
    runs = [run for step in steps for run in step]
    sequences = slice(first_rank, first_rank + len(steps[0]))
    firsts = accumulate((len(step) for step in steps), initial=0)
    counts = [(first, len(step)) for first, step in zip(firsts, steps, strict=False)]
    start, total = runs[0][0], sum(size for _, size in runs)
    places: slice | Tensor | None = None if total == chunk * len(runs) else slice(0, total)
    consecutive = all(a + chunk == b for (a, _), (b, _) in pairwise(runs))
    if consecutive and total > chunk * (len(runs) - 1):  # only the last chunk may be short
        return Segment(sequences, counts, chunk, slice(start, start + total), places)
    first, size = torch.tensor(runs, device=device).unsqueeze(-1).unbind(1)
    row = torch.arange(chunk, device=device)
    taken = row < size
    if places is not None:
        places = taken.flatten().nonzero().squeeze(1)
    return Segment(sequences, counts, chunk, (first + row)[taken], places)
