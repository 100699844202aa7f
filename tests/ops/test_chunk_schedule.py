"""Every token lies in exactly one chunk of its own sequence, whatever the lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.ops.chunk_schedule import (
    Lattice,
    TokenOrder,
    build_schedule,
    most_segment_starts,
)

CPU = torch.device("cpu")


def schedule_of(bounds, chunks_per_segment, *, chunk=16, side_by_side=1, device=CPU):
    return build_schedule(
        bounds,
        chunk=chunk,
        chunks_per_segment=chunks_per_segment,
        side_by_side=side_by_side,
        device=device,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(0, 40), st.sampled_from([8, 16])), max_size=8),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 12),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_reading_and_writing_all_segments_is_the_identity(
    lengths, chunk, chunks_per_segment, side_by_side, bits_reversed
):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    schedule = build_schedule(
        bounds,
        chunk=chunk,
        chunks_per_segment=chunks_per_segment,
        side_by_side=side_by_side,
        device=CPU,
    )
    order = TokenOrder(chunk, bits_reversed=bits_reversed)
    x = torch.arange(bounds[-1] * 6.0).view(-1, 2, 3) + 1
    copy, seen = torch.zeros_like(x), 0
    for segment in schedule.segments:
        chunks = segment.read(x, order)
        assert chunks.shape == (*order.sizes, *segment.shape.grid, 2, 3)
        seen += (chunks != 0).any(-1).sum().item()
        segment.write(copy, order, lambda to, chunks=chunks: to.copy_(chunks))
        shape = segment.shape
        assert shape.num_chunks <= chunks_per_segment or len(shape.steps) == 1
    assert torch.equal(copy, x)
    assert seen == 2 * bounds[-1]  # no token twice: padding is zero


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 70), max_size=8), st.integers(1, 12), st.integers(1, 3))
def test_every_sequence_is_scanned_in_order(lengths, chunks_per_segment, side_by_side):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    schedule = schedule_of(bounds, chunks_per_segment, chunk=4, side_by_side=side_by_side)
    order = TokenOrder(4, bits_reversed=False)
    tokens = torch.arange(bounds[-1]) + 1
    scanned = [[] for _ in lengths]
    for segment in schedule.segments:
        chunks = segment.read(tokens, order).flatten(1).t()  # [n, C]
        for step in chunks.split(segment.shape.steps):
            for i, chunk in enumerate(step):
                scanned[segment.sequences.start + i] += chunk.tolist()
    ranks = range(len(lengths)) if schedule.by_rank is None else schedule.by_rank.tolist()
    for rank, n in enumerate(ranks):
        got = [token - 1 for token in scanned[rank] if token]
        assert got == list(range(bounds[n], bounds[n + 1]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(0, 300), st.sampled_from([64, 100])), max_size=40),
    st.integers(1, 40),
)
def test_segments_of_packed_sequences_start_from_few_states(lengths, chunks_per_segment):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert_few_starts(bounds, chunks_per_segment, side_by_side=1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 300), st.integers(1, 40), st.integers(1, 10))
def test_segments_of_a_batch_start_from_few_states(B, T, chunks_per_segment, side_by_side):
    assert_few_starts([b * T for b in range(B + 1)], chunks_per_segment, side_by_side)


def assert_few_starts(bounds, chunks_per_segment, side_by_side):
    schedule = schedule_of(bounds, chunks_per_segment, chunk=4, side_by_side=side_by_side)
    starts = sum(segment.num_sequences for segment in schedule.segments)
    assert starts <= most_segment_starts(
        len(bounds) - 1,
        bounds[-1],
        chunk=4,
        chunks_per_segment=chunks_per_segment,
        side_by_side=side_by_side,
    )


def test_bits_are_reversed():
    assert TokenOrder(8, bits_reversed=True).times(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert TokenOrder(8, bits_reversed=False).times(8).tolist() == list(range(8))


def test_equal_sequences_are_read_through_a_view():
    schedule = schedule_of([0, 128, 256, 384], 12, side_by_side=3)
    places = [segment.place for segment in schedule.segments]
    assert places == [Lattice(0, 128, 4, 3), Lattice(64, 128, 4, 3)]


def test_long_sequences_are_read_through_views_and_their_ends_together():
    schedule = schedule_of([0, 50, 55, 100], 2)
    assert schedule.by_rank.tolist() == [2, 1, 0]  # by what is gathered of them
    *bodies, longer, shortest = [segment.place for segment in schedule.segments]
    assert bodies == [Lattice(55, 0, 2, 1), Lattice(0, 0, 2, 1), Lattice(32, 0, 1, 1)]
    assert longer.tokens[longer.taken].tolist() == [*range(87, 100), *range(50, 55)]
    assert shortest.tokens[shortest.taken].tolist() == [48, 49]


def test_indices_are_made_on_the_tensors_device():
    # A short chunk needs indices; the meta device shows where they would be made.
    with pytest.raises(NotImplementedError, match="nonzero"):
        schedule_of([0, 20], 4, device=torch.device("meta"))


def test_ranks_are_undone():
    schedule = schedule_of([0, 3, 3, 20], 4, chunk=4)
    states = torch.randn(3, 2)
    assert schedule.by_rank.tolist() == [0, 2, 1]
    assert torch.equal(schedule.unrank(schedule.rank(states)), states)
