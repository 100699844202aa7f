"""Which tokens form which chunk, and in which order chunks are worked on.

Every sequence is cut into chunks from its own start. Chunks that can be worked on together form a
segment: consecutive steps of the scan over a group of sequences, small enough that its workspaces
stay in cache. Equal sequences (a batch) and packed ones of any length are the same thing here.

Axes: n chunks of a segment, C tokens a chunk, H heads, D channels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_CACHE_LINES_APART = 17


class Workspace:
    """Buffers by name, which the segments of a call share.

    Fresh memory costs a page fault for every 4 KB, which takes longer than computing on it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, zero: bool = False) -> Tensor:
        """A tensor that shares memory with the last one of that name, unless that was too small.

        zero: new memory is zeros. A user that leaves some of them finds them again, as long as the
        last axes are those of the last user.
        """
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # Buffers that start at the same offset of a page compete for the same cache lines.
            skew = _CACHE_LINES_APART * len(self._buffers) % 64 * 64 // self.dtype.itemsize
            make = torch.zeros if zero else torch.empty
            buffer = make(skew + size, dtype=self.dtype, device=self.device)[skew:]
            self._buffers[name] = buffer
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
    steps: tuple[tuple[int, int], ...]
    chunk: int
    place: Lattice | Scattered

    @property
    def num_sequences(self) -> int:
        return self.sequences.stop - self.sequences.start

    @property
    def num_chunks(self) -> int:
        return sum(count for _, count in self.steps)

    @property
    def grid(self) -> tuple[int, int]:
        """The axes (steps, sequences) that `read` splits the chunks into; (n, 1) if scattered."""
        if isinstance(self.place, Lattice):
            return self.place.steps, self.place.sequences
        return self.num_chunks, 1

    def read(self, x: Tensor, order: TokenOrder) -> Tensor:
        """The segment's part of x ``[tokens, ...]`` as ``[*order, *grid, ...]``.

        A view, with n as two axes (steps, sequences), where the chunks form a lattice; else a copy
        with zeros as padding.
        """
        if isinstance(self.place, Lattice):
            return _view(x, self.place, self.chunk, order)
        rows = x.index_select(0, self.place.tokens).index_fill_(0, self.place.padding, 0)
        return _view(rows, Lattice(0, 0, self.num_chunks, 1), self.chunk, order)

    def write(self, x: Tensor, order: TokenOrder, compute: Callable[[Tensor], object]) -> None:
        """Have ``compute(out)`` fill the segment's part of x, laid out as by `read`."""
        if isinstance(self.place, Lattice):
            compute(_view(x, self.place, self.chunk, order))
            return
        at = self.place
        rows = x.new_empty(self.num_chunks * self.chunk, *x.shape[1:])
        compute(_view(rows, Lattice(0, 0, self.num_chunks, 1), self.chunk, order))
        if len(at.padding):
            x.index_copy_(0, at.tokens[at.taken], rows.index_select(0, at.taken))
        else:
            x.index_copy_(0, at.tokens, rows)


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
        by_length: the sequence at each rank (steps count sequences by rank, longest first); None
            when that is the given order.
    """

    segments: list[Segment]
    num_sequences: int
    by_length: Tensor | None

    def rank(self, state: Tensor) -> Tensor:
        """Copy states ``[N, ...]`` from the caller's order to the order of ranks."""
        if self.by_length is None:
            return state.clone(memory_format=torch.contiguous_format)
        return state[self.by_length].contiguous()

    def unrank(self, state: Tensor) -> Tensor:
        """Undo `rank`."""
        if self.by_length is None:
            return state
        given = torch.empty_like(state)
        given[self.by_length] = state
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
    lengths = [stop - start for start, stop in pairwise(bounds)]
    by_length = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    sequences = [(bounds[n], lengths[n]) for n in by_length]
    segments = list(_cut(sequences, chunk, chunks_per_segment, side_by_side, device))
    in_order = by_length == list(range(len(by_length)))
    ranks = None if in_order else torch.tensor(by_length, device=device)
    return Schedule(segments, len(sequences), ranks)


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


def _cut(
    sequences: list[tuple[int, int]],
    chunk: int,
    chunks_per_segment: int,
    side_by_side: int,
    device: torch.device,
) -> Iterator[Segment]:
    """Segments of all (start, length), sorted by falling length.

    Full chunks of long sequences, or of many equal ones, are lattices. What is left of those, and
    all shorter sequences, are gathered.
    """
    rest: list[tuple[int, int]] = []
    rank, rest_of_lattices = 0, False
    for run in _regular_runs(sequences, chunk, chunks_per_segment, side_by_side):
        start, length = run[0]
        full = length // chunk
        is_lattice = 2 * len(run) * full >= chunks_per_segment
        if is_lattice != rest_of_lattices:
            yield from _gather(rest, rank - len(rest), chunk, chunks_per_segment, device)
            rest, rest_of_lattices = [], is_lattice
        if is_lattice:
            stride = run[1][0] - start if len(run) > 1 else 0
            at_once = max(1, chunks_per_segment // len(run))
            for first in range(0, full, at_once):
                place = Lattice(start + first * chunk, stride, min(at_once, full - first), len(run))
                steps = tuple((step * len(run), len(run)) for step in range(place.steps))
                yield Segment(slice(rank, rank + len(run)), steps, chunk, place)
            run = [(start + full * chunk, length - full * chunk) for start, length in run]
        rest += run
        rank += len(run)
    yield from _gather(rest, rank - len(rest), chunk, chunks_per_segment, device)


def _regular_runs(
    sequences: list[tuple[int, int]], chunk: int, chunks_per_segment: int, side_by_side: int
) -> Iterator[list[tuple[int, int]]]:
    """Neighbours of equal length at equal distances upwards that may share segments."""
    run: list[tuple[int, int]] = []
    for start, length in sequences:
        regular = (
            run
            and length == run[0][1]
            and start >= run[-1][0]
            and (len(run) == 1 or start - run[-1][0] == run[1][0] - run[0][0])
        )
        chunks = (len(run) + 1) * (length // chunk)
        if run and not (regular and (len(run) < side_by_side or chunks <= chunks_per_segment)):
            yield run
            run = []
        run.append((start, length))
    if run:
        yield run


def _gather(
    sequences: list[tuple[int, int]],
    rank: int,
    chunk: int,
    chunks_per_segment: int,
    device: torch.device,
) -> Iterator[Segment]:
    """Segments of short sequences, which they hold whole; `rank` is that of the first."""
    group: list[tuple[int, int]] = []
    chunks = 0
    for start, length in sequences:
        own = max(1, -(-length // chunk))
        if group and chunks + own > chunks_per_segment:
            yield from _gathered_segment(group, rank, chunk, device)
            rank += len(group)
            group, chunks = [], 0
        group.append((start, length))
        chunks += own
    yield from _gathered_segment(group, rank, chunk, device)


def _gathered_segment(
    group: list[tuple[int, int]], rank: int, chunk: int, device: torch.device
) -> Iterator[Segment]:
    """One segment for the whole group; none where no sequence has a token."""
    steps: list[list[tuple[int, int]]] = []  # (first token, tokens) of each step's chunks
    for offset in range(0, max((length for _, length in group), default=0), chunk):
        step = [(start + offset, min(chunk, length - offset)) for start, length in group]
        while step[-1][1] <= 0:
            step.pop()
        steps.append(step)
    if not steps:
        return
    firsts = accumulate((len(step) for step in steps), initial=0)
    counts = tuple((first, len(step)) for first, step in zip(firsts, steps, strict=False))
    runs = torch.tensor([run for step in steps for run in step], device=device)
    first, size = runs.unsqueeze(-1).unbind(1)
    row = torch.arange(chunk, device=device)
    taken = row < size
    tokens = (first + row).where(taken, 0).flatten()
    place = Scattered(tokens, *(x.flatten().nonzero().squeeze(1) for x in (taken, ~taken)))
    yield Segment(slice(rank, rank + len(steps[0])), counts, chunk, place)
