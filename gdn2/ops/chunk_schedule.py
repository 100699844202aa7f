"""Which tokens form which chunk, and in which order chunks are worked on.

Every sequence is cut into chunks from its own start. Chunks that can be worked on together form a
segment: consecutive steps of the scan over a group of sequences, small enough that its workspaces
stay in cache. Equal sequences (a batch) and packed ones of any length are the same thing here.

Axes: n chunks of a segment, C tokens a chunk, H heads, D channels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_CACHE_LINES_APART = 17


class Workspace:
    """Buffers by name, which all segments share.

    Fresh memory costs a page fault for every 4 KB, which takes longer than computing on it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._buffers: dict[tuple, Tensor] = {}

    def __call__(self, name: str, *shape: int, zero: bool = False) -> Tensor:
        """A tensor that shares memory with the last one of that name, unless that was too small.

        zero: new memory is zeros, and is shared among equal last axes only: a user that leaves some
        of them finds them again.
        """
        key, size = (name, shape[1:] if zero else None), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Buffers that start at the same offset of a page compete for the same cache lines.
            skew = _CACHE_LINES_APART * len(self._buffers) % 64 * 64 // self.dtype.itemsize
            make = torch.zeros if zero else torch.empty
            with torch.inference_mode(mode=False):  # what it makes may not be for that mode alone
                buffer = make(skew + size, dtype=self.dtype, device=self.device)[skew:]
            self._buffers[key] = buffer
        return buffer[:size].view(shape)


class TokenOrder:
    """How the C tokens of a chunk lie along an axis: in time, or by their reversed index bits.

    With bits reversed, token 1 comes at C/2, token 2 at C/4, token 3 at 3C/4 ... Then, for every
    h = 1, 2, 4 ..., tokens that have the same place within their block of h tokens are neighbours,
    and all blocks are met at one stride: pairs of blocks merge in slabs (`ChannelDecay`).

    Attributes:
        bits_reversed: as given.
        sizes, distances: of the axes that the token axis splits into; distances in tokens.
    """

    def __init__(self, C: int, *, bits_reversed: bool):
        assert C & (C - 1) == 0, f"the tokens of a chunk must be a power of two, got {C}"
        by_bits = [(2, 2**i) for i in range(C.bit_length() - 1)]
        self.bits_reversed = bits_reversed
        split = by_bits if bits_reversed and by_bits else [(C, 1)]
        self.sizes, self.distances = zip(*split, strict=True)

    def times(self, C: int) -> Tensor:
        """The time of the token at each place."""
        return _view(torch.arange(C), Lattice(0, 0, 1, 1), C, self).reshape(C)


@dataclass(frozen=True)
class Lattice:
    """Full chunks at ``start + step * chunk + sequence * stride``: a strided view finds them."""

    start: int
    stride: int
    steps: int
    sequences: int


@dataclass(frozen=True)
class Scattered:
    """Any chunks, some of them short or even empty.

    Attributes:
        tokens: position in the flat token axis of each of the ``n C`` rows; any token for padding.
        taken, padding: which rows are tokens, and which are padding.
    """

    tokens: Tensor
    taken: Tensor
    padding: Tensor


class Shape(NamedTuple):
    """What the buffers of a segment's chunks depend on.

    Attributes:
        chunk: tokens a chunk.
        steps: the number of chunks of each step of the scan.
        grid: the axes (steps, sequences) of the chunks; (n, 1) where their steps are not equal.
    """

    chunk: int
    steps: tuple[int, ...]
    grid: tuple[int, int]

    @property
    def num_chunks(self) -> int:
        return sum(self.steps)


@dataclass(frozen=True)
class Segment:
    """Chunks in step-major order: all sequences' first chunks of the segment, then the second ...

    Attributes:
        sequences: ranks of the sequences that the segment's first step works on; the chunks of
            every step belong to the first of these, one each.
        shape: how many chunks there are.
        place: where the tokens are.
    """

    sequences: slice
    shape: Shape
    place: Lattice | Scattered

    @property
    def num_sequences(self) -> int:
        return self.sequences.stop - self.sequences.start

    def read(self, x: Tensor, order: TokenOrder) -> Tensor:
        """The segment's part of x ``[tokens, ...]`` as ``[*order, *grid, ...]``.

        A view, with n as two axes (steps, sequences), where the chunks form a lattice; else a copy
        with zeros as padding.
        """
        if isinstance(self.place, Lattice):
            return _view(x, self.place, self.shape.chunk, order)
        rows = x.index_select(0, self.place.tokens).index_fill_(0, self.place.padding, 0)
        return self._in_chunks(rows, order)

    def write(self, x: Tensor, order: TokenOrder, compute: Callable[[Tensor], object]) -> None:
        """Have ``compute(out)`` fill the segment's part of x, laid out as by `read`."""
        if isinstance(self.place, Lattice):
            compute(_view(x, self.place, self.shape.chunk, order))
            return
        at = self.place
        rows = x.new_empty(len(at.tokens), *x.shape[1:])
        compute(self._in_chunks(rows, order))
        if len(at.padding):
            x.index_copy_(0, at.tokens[at.taken], rows.index_select(0, at.taken))
        else:
            x.index_copy_(0, at.tokens, rows)

    def _in_chunks(self, rows: Tensor, order: TokenOrder) -> Tensor:
        return _view(rows, Lattice(0, 0, self.shape.num_chunks, 1), self.shape.chunk, order)


def _view(x: Tensor, at: Lattice, chunk: int, order: TokenOrder) -> Tensor:
    token, *rest = x.stride()
    return x.as_strided(
        (*order.sizes, at.steps, at.sequences, *x.shape[1:]),
        (
            *(distance * token for distance in order.distances),
            chunk * token,
            at.stride * token,
            *rest,
        ),
        x.storage_offset() + at.start * token,
    )


@dataclass(frozen=True)
class Schedule:
    """All segments in the order of the scan.

    Attributes:
        segments: for a group of sequences from their first to their last chunks, group by group.
        by_rank: the sequence at each rank; None when that is the given order.
    """

    segments: list[Segment]
    num_sequences: int
    by_rank: Tensor | None

    def rank(self, state: Tensor) -> Tensor:
        """Copy states ``[N, ...]`` from the caller's order to the order of ranks."""
        if self.by_rank is None:
            return state.clone(memory_format=torch.contiguous_format)
        return state[self.by_rank].contiguous()

    def unrank(self, state: Tensor) -> Tensor:
        """Undo `rank`."""
        if self.by_rank is None:
            return state
        given = torch.empty_like(state)
        given[self.by_rank] = state
        return given


def build_schedule(
    bounds: list[int],
    *,
    chunk: int,
    chunks_per_segment: int,
    side_by_side: int,
    device: torch.device,
) -> Schedule:
    """Cut the sequences between `bounds` of the flat token axis into chunks and segments.

    side_by_side: how many equal sequences may share segments that they go beyond.
    """
    sequences = [
        _Sequence(n, start, stop - start) for n, (start, stop) in enumerate(pairwise(bounds))
    ]
    sequences.sort(key=lambda sequence: -sequence.length)
    runs = [
        (run, _in_lattices(run, chunk, chunks_per_segment))
        for run in _regular_runs(sequences, chunk, chunks_per_segment, side_by_side)
    ]
    runs.sort(key=lambda run: run[1] - run[0][0].length)  # by what is left of each sequence
    segments: list[Segment] = []
    ranks: list[_Sequence] = []
    for run, tokens in runs:
        segments += _lattices(run, tokens, len(ranks), chunk, chunks_per_segment)
        ranks += run
    rest = [(x.start + tokens, x.length - tokens) for run, tokens in runs for x in run]
    segments += _gather(rest, chunk, chunks_per_segment, device)
    numbers = [sequence.number for sequence in ranks]
    in_order = numbers == list(range(len(numbers)))
    by_rank = None if in_order else torch.tensor(numbers, device=device)
    return Schedule(segments, len(numbers), by_rank)


def most_segment_starts(
    num_sequences: int, tokens: int, *, chunk: int, chunks_per_segment: int, side_by_side: int
) -> int:
    """Upper bound for the sequences of all segments together, without a look at the boundaries.

    Of any sequences for ``side_by_side = 1``, else of equal ones.
    """
    if side_by_side == 1:
        return 2 * num_sequences + -(-tokens // (chunk * chunks_per_segment))
    chunks = tokens // max(num_sequences, 1) // chunk
    together = max(side_by_side, chunks_per_segment // max(chunks, 1))
    at_once = max(1, chunks_per_segment // max(1, min(num_sequences, together)))
    return num_sequences * (1 + -(-chunks // at_once))


class _Sequence(NamedTuple):
    number: int
    start: int
    length: int


def _in_lattices(run: list[_Sequence], chunk: int, chunks_per_segment: int) -> int:
    """How many tokens of each of these equal sequences lattices take; the rest is gathered."""
    full = run[0].length // chunk
    return full * chunk if 2 * len(run) * full >= chunks_per_segment else 0


def _lattices(
    run: list[_Sequence], tokens: int, rank: int, chunk: int, chunks_per_segment: int
) -> Iterator[Segment]:
    """Segments of the first tokens of equal sequences; `rank` is that of the first."""
    start, count = run[0].start, len(run)
    stride = run[1].start - start if count > 1 else 0
    at_once = max(1, chunks_per_segment // count) * chunk
    for first in range(0, tokens, at_once):
        steps = min(at_once, tokens - first) // chunk
        shape = Shape(chunk, (count,) * steps, (steps, count))
        place = Lattice(start + first, stride, steps, count)
        yield Segment(slice(rank, rank + count), shape, place)


def _regular_runs(
    sequences: list[_Sequence], chunk: int, chunks_per_segment: int, side_by_side: int
) -> Iterator[list[_Sequence]]:
    """Neighbours of equal length at equal distances upwards that may share segments."""
    run: list[_Sequence] = []
    for x in sequences:
        regular = (
            run
            and x.length == run[0].length
            and x.start >= run[-1].start
            and (len(run) == 1 or x.start - run[-1].start == run[1].start - run[0].start)
        )
        chunks = (len(run) + 1) * (x.length // chunk)
        if run and not (regular and (len(run) < side_by_side or chunks <= chunks_per_segment)):
            yield run
            run = []
        run.append(x)
    if run:
        yield run


def _gather(
    rest: list[tuple[int, int]], chunk: int, chunks_per_segment: int, device: torch.device
) -> Iterator[Segment]:
    """Segments of all (start, length) by rank, longest first; each holds its sequences whole."""
    first = 0
    chunks = [max(1, -(-length // chunk)) for _, length in rest]
    for stop in range(1, len(rest) + 1):
        if stop == len(rest) or sum(chunks[first : stop + 1]) > chunks_per_segment:
            yield from _gathered_segment(rest[first:stop], first, chunk, device)
            first = stop


def _gathered_segment(
    group: list[tuple[int, int]], rank: int, chunk: int, device: torch.device
) -> Iterator[Segment]:
    """One segment for the whole group; none where no sequence has a token."""
    steps = [
        [
            (start + offset, min(chunk, length - offset))
            for start, length in group
            if length > offset
        ]
        for offset in range(0, group[0][1], chunk)
    ]  # (first token, tokens) of each step's chunks
    if not steps:
        return
    counts = tuple(len(step) for step in steps)
    shape = Shape(chunk, counts, (sum(counts), 1))
    runs = torch.tensor([run for step in steps for run in step], device=device)
    first, size = runs.unsqueeze(-1).unbind(1)
    row = torch.arange(chunk, device=device)
    taken = row < size
    tokens = (first + row).where(taken, 0).flatten()
    place = Scattered(tokens, *(x.flatten().nonzero().squeeze(1) for x in (taken, ~taken)))
    yield Segment(slice(rank, rank + counts[0]), shape, place)
