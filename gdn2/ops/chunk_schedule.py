"""Which tokens form which chunk, and in which order chunks are worked on.

Every sequence is cut into chunks from its own start. Chunks that can be worked on together form a
segment: consecutive steps of the scan over a group of sequences, small enough that its workspaces
stay in cache. Equal sequences (a batch) and packed ones of any length are the same thing here.

Axes: n chunks of a segment, C tokens a chunk, H heads, D channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, made once a call and used again by every segment.

    Fresh memory costs a page fault for every 4 KB, which takes longer than computing on it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; it shares memory with the last one of that name."""
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Lattice:
    """Full chunks at ``start + step * chunk + sequence * stride``: a strided view finds them."""

    start: int
    stride: int
    steps: int
    sequences: int


@dataclass(frozen=True)
class Scattered:
    """Any chunks, some of them short.

    Attributes:
        tokens: positions of the tokens in the flat token axis.
        rows: where they go in the ``n * C`` rows of the chunks; the others are padding.
    """

    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Segment:
    """Chunks in step-major order: all sequences' first chunks of the segment, then the second ...

    Attributes:
        sequences: ranks of the sequences that the segment's first step works on.
        steps: ``(first chunk, number of chunks)`` of each step of the scan; a step's chunks belong
            to the first of `sequences`, one each.
        chunk: tokens a chunk.
        place: where the tokens are.
    """

    sequences: slice
    steps: list[tuple[int, int]]
    chunk: int
    place: Lattice | Scattered

    @property
    def num_chunks(self) -> int:
        return sum(count for _, count in self.steps)

    def load(self, x: Tensor, chunks: Tensor) -> Tensor:
        """Copy tokens of x ``[tokens, H, D]`` into chunks ``[n, H, C, D]``; padding is zero."""
        if isinstance(self.place, Lattice):
            self._by_step(chunks).copy_(self._view(x))
            return chunks
        rows = x.new_zeros(self.num_chunks * self.chunk, *x.shape[1:])
        rows.index_copy_(0, self.place.rows, x.index_select(0, self.place.tokens))
        return chunks.copy_(rows.unflatten(0, (-1, self.chunk)).transpose(1, 2))

    def store(self, chunks: Tensor, x: Tensor) -> None:
        """Copy chunks ``[n, H, C, D]`` back to their tokens of x ``[tokens, H, D]``."""
        if isinstance(self.place, Lattice):
            self._view(x).copy_(self._by_step(chunks))
        else:
            rows = chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.place.rows)
            x.index_copy_(0, self.place.tokens, rows.to(x.dtype))

    def _by_step(self, chunks: Tensor) -> Tensor:
        return chunks.unflatten(0, (len(self.steps), -1))  # [steps, sequences, H, C, D]

    def _view(self, x: Tensor) -> Tensor:
        """The chunks of x as [steps, sequences, H, C, D] without a copy."""
        token, head, channel = x.stride()
        at = self.place
        assert isinstance(at, Lattice)
        return x.as_strided(
            (at.steps, at.sequences, x.shape[1], self.chunk, x.shape[2]),
            (self.chunk * token, at.stride * token, head, token, channel),
            x.storage_offset() + at.start * token,
        )


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
    bounds: list[int], *, chunk: int, chunks_per_segment: int, device: torch.device
) -> Schedule:
    """Cut the sequences between `bounds` of the flat token axis into chunks and segments."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    sequences = [(bounds[n], lengths[n]) for n in order]
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
    device: torch.device,
) -> Iterator[Segment]:
    """Segments of a group of (start, length) that is sorted by falling length."""
    steps: list[list[tuple[int, int]]] = []  # (first token, tokens) of every chunk of every step
    for offset in range(0, group[0][1], chunk):
        step = [(start + offset, min(chunk, length - offset)) for start, length in group]
        step = [run for run in step if run[1] > 0]
        too_many = sum(map(len, steps)) + len(step) > chunks_per_segment
        # A step with short chunks or fewer sequences is best left out of a lattice.
        irregular = steps and (len(step) < len(steps[0]) or step[-1][1] < chunk)
        if steps and (too_many or (irregular and _lattice(steps, chunk))):
            yield _build_segment(steps, first_rank, chunk, device)
            steps = []
        steps.append(step)
    if steps:
        yield _build_segment(steps, first_rank, chunk, device)


def _build_segment(
    steps: list[list[tuple[int, int]]], first_rank: int, chunk: int, device: torch.device
) -> Segment:
    sequences = slice(first_rank, first_rank + len(steps[0]))
    firsts = accumulate((len(step) for step in steps), initial=0)
    counts = [(first, len(step)) for first, step in zip(firsts, steps, strict=False)]
    place: Lattice | Scattered | None = _lattice(steps, chunk)
    if place is None:
        runs = torch.tensor([run for step in steps for run in step], device=device)
        first, size = runs.unsqueeze(-1).unbind(1)
        row = torch.arange(chunk, device=device)
        taken = row < size
        place = Scattered((first + row)[taken], taken.flatten().nonzero().squeeze(1))
    return Segment(sequences, counts, chunk, place)


def _lattice(steps: list[list[tuple[int, int]]], chunk: int) -> Lattice | None:
    """The chunks as a lattice, if they are full, and of sequences at equal distances upwards."""
    starts = [start for start, _ in steps[0]]
    strides = {b - a for a, b in pairwise(starts)} or {0}
    full = all(size == chunk for _, size in steps[-1]) and len(steps[-1]) == len(steps[0])
    if not full or len(strides) > 1 or min(strides) < 0:
        return None
    return Lattice(starts[0], strides.pop(), len(steps), len(starts))
