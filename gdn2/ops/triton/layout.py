"""Where the kernels find things: rows of operands, and pieces (chunks, segments) of sequences."""

import triton
import triton.language as tl


@triton.jit
def locate(
    piece, cu_seqlens, piece_sequence, first_piece, T, L: tl.constexpr, PACKED: tl.constexpr
):
    """The sequence of a piece of L tokens, that sequence's start and length, and its first token.

    Pieces are numbered through all sequences, of which each has at least one. A surplus piece
    starts at its sequence's end or beyond.
    """
    if PACKED:
        n = tl.load(piece_sequence + piece).to(tl.int64)
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
        before = (piece - tl.load(first_piece + n)).to(tl.int32) * L
    else:
        pieces = tl.maximum(tl.cdiv(T, L), 1)
        n = (piece // pieces).to(tl.int64)
        start = n * T
        length = T
        before = piece % pieces * L
    return n, start, length, before


@triton.jit
def load_rows(x, token, stride, channel, mask):
    """``x[token, channel]`` as a tile, zero where masked; channels of all heads are numbered."""
    return tl.load(x + token[:, None] * stride + channel[None, :], mask=mask, other=0.0)
