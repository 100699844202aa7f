"""Every token lies in exactly one chunk of its own sequence, whatever the lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.ops.chunk_schedule import Lattice, build_schedule

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40), max_size=8),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 12),
)
def test_loading_and_storing_all_segments_is_the_identity(lengths, chunk, chunks_per_segment):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    schedule = build_schedule(
        bounds, chunk=chunk, chunks_per_segment=chunks_per_segment, device=CPU
    )
    x = torch.arange(bounds[-1] * 6.0).view(-1, 2, 3) + 1
    copy, seen = torch.zeros_like(x), 0
    for segment in schedule.segments:
        n = segment.num_chunks
        chunks = segment.load(x, torch.empty(n, 2, chunk, 3))
        seen += (chunks != 0).any(-1).sum().item()
        segment.store(chunks, copy)
        assert n <= max(chunks_per_segment, 1) or len(segment.steps) == 1
    assert torch.equal(copy, x)
    assert seen == 2 * bounds[-1]  # no token twice: padding is zero


def test_equal_sequences_are_read_through_a_view():
    schedule = build_schedule([0, 64, 128, 192], chunk=16, chunks_per_segment=6, device=CPU)
    places = [segment.place for segment in schedule.segments]
    assert places == [Lattice(0, 64, 2, 3), Lattice(32, 64, 2, 3)]


def test_indices_are_made_on_the_tensors_device():
    # A short chunk needs indices; the meta device shows where they would be made.
    with pytest.raises(NotImplementedError, match="nonzero"):
        build_schedule([0, 20], chunk=16, chunks_per_segment=4, device=torch.device("meta"))


def test_ranks_are_undone():
    schedule = build_schedule([0, 3, 3, 20], chunk=4, chunks_per_segment=4, device=CPU)
    states = torch.randn(3, 2)
    assert schedule.order.tolist() == [2, 0, 1]
    assert torch.equal(schedule.unrank(schedule.rank(states)), states)
